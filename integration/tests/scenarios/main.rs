//! Accidents around a move that have no message boundary of their own, with stamping guests and the judge of what they
//! saw. Each test begins with its number in docs/scenarios.md, which says where the others are.

mod clocks;
mod guests;
mod list;
mod network;
mod scene;
mod servers;
