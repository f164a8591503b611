//! The fault matrix: what becomes of a migrating VM when a process dies or freezes at a message boundary.
//!
//! | module | noun |
//! |---|---|
//! | [`guest`] | a guest that stamps blocks and looks at them again |
//! | [`history`] | what guests did, and the judge of it |
//! | [`stub`] | a running one |
//! | [`vmm`] | the VMM of such a guest: the program `baton-vmm-stub` |
//!
//! The daemons know nothing of this but the names of their points (`fault-point/`), and only in builds for tests.

pub mod guest;
pub mod history;
pub mod stub;
pub mod vmm;
