//! The load generator and the side-by-side benchmark.
//!
//! `load` drives one vhost-user disk and measures it, `cpu` tells who used the CPUs meanwhile, `stack` starts a
//! backend with its storage server, `compare` alternates two stacks and reports ratios, `targets` judges them, `floor` and `chain` measure what is under
//! all of them, `section`
//! writes them down in a `document`, `plot` draws them, `handoff`
//! measures what a move adds, `fair` how evenly queues
//! are served, `tenants` what a neighbour costs, `polling` what looking instead of sleeping brings, `scale` what a request costs as the work grows, `idle` what doing nothing costs, `cost`
//! counts instructions, `standstill` tells when the whole machine was away. Absolute figures drift by a
//! quarter within minutes on a shared machine; only ratios of runs next to each other count.

pub mod callgrind;
pub mod chain;
pub mod compare;
pub mod cost;
pub mod cpu;
mod dirty;
pub mod document;
pub mod fair;
pub mod floor;
pub mod handoff;
pub mod idle;
pub mod load;
pub mod outcome;
pub mod plot;
pub mod polling;
pub mod programs;
pub mod scale;
pub mod section;
pub mod stack;
pub mod standstill;
pub mod stats;
pub mod targets;
pub mod tenants;
