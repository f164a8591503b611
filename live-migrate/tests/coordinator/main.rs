//! `baton-coordinator` as a program, on servers with real access records and
//! agents with pretended backends.

mod away;
mod crashes;
mod document;
mod events;
mod fences;
mod handoffs;
mod metrics;
mod migrations;
mod real_storage;
mod roles;
mod support;
mod trouble;
mod world;
