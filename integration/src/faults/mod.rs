//! The fault matrix: what becomes of a migrating VM when a process dies or freezes at a message boundary.
//!
//! | module | noun |
//! |---|---|
//! | [`case`] | the cases, generated from the list of points |
//! | [`cluster`] | the coordinator and the agents |
//! | [`guest`] | a guest that stamps blocks and looks at them again |
//! | [`history`] | what guests did, and the judge of it |
//! | [`injector`] | waits for a point and hurts a process there |
//! | [`recovery`] | when a Ceph cluster that was hurt is of use again |
//! | [`report`] | the table of cases and outcomes |
//! | [`run`] | one case from start to end |
//! | [`stub`], [`vmm`] | the VMM of such a guest, from outside and from inside: the program `baton-vmm-stub` |
//! | [`world`] | all processes of a case |
//!
//! The daemons know nothing of this but the names of their points (`fault-point/`), and only in builds for tests.

pub mod case;
pub mod cluster;
pub mod guest;
pub mod history;
pub mod injector;
pub mod recovery;
pub mod report;
pub mod run;
pub mod stub;
pub mod vmm;
pub mod world;
