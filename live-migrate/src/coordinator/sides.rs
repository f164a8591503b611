//! The two hosts of a handoff, asked before anything is armed: a host that cannot
//! do its part then costs the VM nothing.

use axum::http::StatusCode;
use futures_util::StreamExt;
use futures_util::future::OptionFuture;
use futures_util::stream::FuturesUnordered;

use super::agents::{Agent, AgentError};
use super::core::Core;
use super::fault::{Fault, owner_sentence};
use super::plan::Trouble;
use super::prepare::{agent, unknown_host, unknown_vm};
use super::vm_view::VmView;

/// A VM, before its volumes have said where it runs.
pub(super) struct Found {
    /// What it is, and how it is where it was found.
    pub(super) view: VmView,
    /// The host that the caller named.
    pub(super) named: Option<String>,
    /// The host whose agent says that the backend there serves.
    pub(super) serving: Option<String>,
    /// The host whose agent told all this; `None`: it was remembered.
    pub(super) told_by: Option<String>,
}

impl Found {
    /// Who owns the VM, for a sentence, as far as its volumes need not be asked.
    pub(super) fn owner_so_far(&self, core: &Core, vm: &str) -> String {
        match &self.told_by {
            Some(host) if self.serving.is_none() && self.view.backend_runs() => {
                format!("the agent of {host} says that it runs the backend of `{vm}`")
            }
            _ => owner_so_far(core, vm, self.serving.as_deref()),
        }
    }
}

/// The VM as the agent of the host where it runs tells it; by others, or as it was
/// remembered, where that one does not answer.
///
/// # Errors
/// Nobody knows such a VM, or nobody who might answers.
pub(super) async fn find(core: &Core, vm: &str, from: Option<&str>) -> Result<Found, Fault> {
    let asked = match from {
        Some(from) => vec![agent(core, vm, from).await?],
        None => core.agents.iter().collect(),
    };
    ask(core, vm, from, asked).await
}

async fn ask(
    core: &Core,
    vm: &str,
    from: Option<&str>,
    asked: Vec<&Agent>,
) -> Result<Found, Fault> {
    let named = from.map(str::to_owned);
    let within = core.config.agent_patience;
    let mut answers: FuturesUnordered<_> = asked
        .iter()
        .map(|agent| async move { (&agent.host.name, agent.vm_within(vm, within).await) })
        .collect();
    let (mut elsewhere, mut silent) = (None, None);
    while let Some((host, answer)) = answers.next().await {
        match answer {
            Ok(view) if view.standing_word() == Some("serving") => {
                let host = Some(host.clone());
                return Ok(Found { view, named, serving: host.clone(), told_by: host });
            }
            // The volumes say which host it is, or whose backend runs.
            Ok(view) => {
                let known = |(_, known): &(_, VmView)| known.backend_runs();
                if !elsewhere.as_ref().is_some_and(known) {
                    elsewhere = Some((host, view));
                }
            }
            Err(error) if error.is_missing() => {}
            Err(error) => silent = Some((host, error)),
        }
    }
    if let Some((host, view)) = elsewhere {
        return Ok(Found { view, named, serving: None, told_by: Some(host.clone()) });
    }
    match (silent, from) {
        (None, Some(from)) => Err(unknown_vm(vm, &format!("the agent of {from} knows no such VM"))),
        (None, None) => Err(unknown_vm(vm, "no agent knows such a VM")),
        (Some((_, AgentError::Refused { trouble, .. })), _) => Err(Fault::of(&trouble)),
        // Who owns it, and whether it can go all the same, its volumes say.
        (Some((host, error)), _) => match core.remembered(vm) {
            Some(view) => Ok(Found { view, named, serving: None, told_by: None }),
            None => Err(Fault::of(&Trouble {
                kind: error.trouble().kind.clone(),
                detail: format!(
                    "{}; nobody else knows `{vm}` and its volumes, so who owns them was not looked up; it stays as it is, and nothing was armed: restart baton-agent on {host} and ask again",
                    error.trouble().detail
                ),
            })),
        },
    }
}

/// The agents that are needed answer: the destination's, which says that the VM does
/// not run there, and, if it will be given orders, the source's, which knows the VM.
/// What they say of it, the source first.
///
/// # Errors
/// [`Fault`]; nothing was armed.
pub(super) async fn answer(
    core: &Core,
    vm: &str,
    (from, to): (&str, &str),
    source_has_orders: bool,
) -> Result<[Option<VmView>; 2], Fault> {
    let patience = core.config.agent_patience;
    let of = |host: &str| {
        let owner = format!("the source {from} owns the volumes of `{vm}`");
        core.agents.of(host).ok_or_else(|| unknown_host(host, &owner))
    };
    let (source, destination) = (of(from)?, of(to)?);
    let source = source_has_orders.then(|| source.vm_patiently(vm, patience));
    let (here, there) =
        tokio::join!(OptionFuture::from(source), destination.vm_patiently(vm, patience));
    let missing =
        |answer: &Result<VmView, AgentError>| answer.as_ref().is_err_and(AgentError::is_missing);
    if here.as_ref().is_some_and(missing) {
        return Err(unknown_vm(
            vm,
            &format!(
                "the agent of {from} knows no such VM, though {from} owns its volumes; nothing was armed: define it there"
            ),
        ));
    }
    // It will be told of the VM.
    let there = if missing(&there) { Ok(None) } else { there.map(Some) };
    match (here.transpose(), there) {
        (Ok(here), Ok(there)) => {
            if let Some(there) = &there {
                does_not_run(vm, there, from, to)?;
            }
            Ok([here, there])
        }
        (here, there) => {
            let mut errors = Vec::new();
            errors.extend(here.err().map(|error| (from, error)));
            errors.extend(there.err().map(|error| (to, error)));
            Err(unheard(vm, from, to, &errors))
        }
    }
}

/// One of the hosts, or both, cannot do its part.
fn unheard(vm: &str, from: &str, to: &str, errors: &[(&str, AgentError)]) -> Fault {
    let details: Vec<&str> = errors.iter().map(|(_, e)| e.trouble().detail.as_str()).collect();
    let hosts: Vec<&str> = errors.iter().map(|(host, _)| *host).collect();
    let dead = if hosts.contains(&from) {
        format!(
            "; if {from} is dead for good, nothing can be moved from it: `baton handoff fence {vm} --dead-host {from} --nominee {to}`, and start it there"
        )
    } else {
        String::new()
    };
    Fault::of(&Trouble {
        kind: errors.first().map_or_else(String::new, |(_, e)| e.trouble().kind.clone()),
        detail: format!(
            "{}; the source {from} owns the volumes of `{vm}`, which stays there as it is, and nothing was armed: see to baton-agent on {} and ask again{dead}",
            details.join("; "),
            hosts.join(" and ")
        ),
    })
}

fn does_not_run(vm: &str, there: &VmView, from: &str, to: &str) -> Result<(), Fault> {
    if there.standing_word() != Some("serving") && there.run() != "running" {
        return Ok(());
    }
    Err(Fault::new(
        StatusCode::CONFLICT,
        "baton:destination-runs-vm",
        "The destination runs the VM already",
        format!(
            "`{vm}` runs on {to} already (machine: {}, backend: {}), and the source {from} owns the volumes; stop the one on {to} first",
            there.run(),
            there.standing_word().unwrap_or("none"),
        ),
    ))
}

/// Who owns a VM's volumes, for a sentence, asked of all agents.
pub(super) async fn owner_now(core: &Core, vm: &str) -> String {
    match ask(core, vm, None, core.agents.iter().collect()).await {
        Ok(found) => found.owner_so_far(core, vm),
        Err(_) => owner_so_far(core, vm, None),
    }
}

/// Who owns a VM's volumes, for a sentence, while a server that would say it is away, or
/// is not asked.
pub(super) fn owner_so_far(core: &Core, vm: &str, serving: Option<&str>) -> String {
    if let Some(host) = serving {
        return format!(
            "the agent of {host} says that it owns the volumes of `{vm}` and serves them"
        );
    }
    match core.latest(vm) {
        Some(handle) => {
            let row = handle.row();
            format!("as last known, from handoff {}, {}", row.id, owner_sentence(&row))
        }
        None => format!(
            "who owns the volumes of `{vm}` is not known here: `baton handoff why {vm}` asks their storage"
        ),
    }
}
