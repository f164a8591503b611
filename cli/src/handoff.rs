//! What `baton vm` and `baton handoff` do, and what they print.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use baton_protocol::handoff::HandoffId;
use serde_json::{Value, json};

use crate::args::{
    Coordinated, CoordinatorCommand, HandoffCommand, Patience, Route, VmCommand, Which, duration,
};
use crate::coordinator::{Coordinator, CoordinatorError, new_id};
use crate::{EXIT_REFUSED, EXIT_UNREACHABLE, Failure, phases, print_text, report, vm_view};

/// `handoff cancel` and `finish`: who owns the volumes.
pub(crate) const EXIT_DESTINATION: u8 = 10;
/// Nobody can say yet.
pub(crate) const EXIT_UNKNOWN: u8 = 20;

/// Between two looks at a migration.
const LOOK: Duration = Duration::from_millis(100);
/// Without an answer for so long the command gives up; the migration goes on.
const SILENT_MAX: Duration = Duration::from_secs(10);
/// A little longer than a handoff may take to prepare, to see how it ended.
const SETTLING: Duration = Duration::from_secs(60);

pub(crate) fn coordinator(command: CoordinatorCommand) -> Result<u8, Failure> {
    match command {
        CoordinatorCommand::List { common } => {
            let answer = Coordinator::new(&common)?.everyone();
            show(&common, &answer, vm_view::coordinators)?;
            let leads = |one: &Value| one["role"] == "leader";
            let led = answer["coordinators"].as_array().is_some_and(|all| all.iter().any(leads));
            Ok(if led { 0 } else { EXIT_UNREACHABLE })
        }
    }
}

pub(crate) fn vm(command: VmCommand) -> Result<u8, Failure> {
    match command {
        VmCommand::List { common } => {
            let answer = Coordinator::new(&common)?.get("/v1/vms")?;
            show(&common, &answer, vm_view::vms)?;
            Ok(0)
        }
        VmCommand::Migrate { vm, to, from, uri, id, report, common } => {
            let id = id.map_or_else(new_id, Ok)?;
            let mut body = json!({"id": id.to_string(), "to": to, "watch_io": report.is_some()});
            for (key, value) in [("from", from), ("uri", uri)] {
                if let Some(value) = value {
                    body[key] = value.into();
                }
            }
            let coordinator = Coordinator::new(&common)?;
            // Afterwards would be too late to ask for another name.
            report.as_deref().map(check_report).transpose()?;
            coordinator.post(&format!("/v1/vms/{}/migrations", vm.name), Some(&body))?;
            let row = follow(&coordinator, &vm.name, id, common.json)?;
            if let Some(file) = report
                && let Err(error) = std::fs::write(&file, report::page(&row))
            {
                // The status says where the VM runs, whatever becomes of the page.
                eprintln!("baton: cannot write the report to {}: {error}", file.display());
            }
            show(&common, &row, phases::text)?;
            Ok(match row["outcome"].as_str() {
                Some("destination") => 0,
                Some("source") => EXIT_REFUSED,
                _ => EXIT_UNKNOWN,
            })
        }
    }
}

pub(crate) fn handoff(command: HandoffCommand) -> Result<u8, Failure> {
    match command {
        HandoffCommand::Prepare { vm, route, id, explicit, wait, common } => {
            let coordinator = Coordinator::new(&common)?;
            let id = id.map_or_else(new_id, Ok)?;
            let row = prepare(&coordinator, &vm.name, id, &route, (explicit, wait))?;
            show(&common, &row, vm_view::handoff)?;
            let late = wait && row["state"] == "PREPARING";
            if late && !is_lost(&row) {
                eprintln!(
                    "baton: it is not READY yet and goes on: look with `baton handoff status {0}`, or end it with `baton handoff cancel {0}`",
                    vm.name
                );
            }
            Ok(if late || is_lost(&row) { EXIT_REFUSED } else { 0 })
        }
        HandoffCommand::Status { which, common } => {
            let coordinator = Coordinator::new(&common)?;
            let row = coordinator.get(&path(&coordinator, &which)?)?;
            show(&common, &row, vm_view::handoff)?;
            Ok(0)
        }
        HandoffCommand::Cancel { which, patience, common } => {
            end(&which, &patience, &common, ("cancel", None))
        }
        HandoffCommand::Finish { force, reason, which, patience, common } => {
            let body = force.then(|| json!({"force": true, "reason": reason}));
            end(&which, &patience, &common, ("finish", body.as_ref()))
        }
        HandoffCommand::Why { vm, common } => {
            let answer = Coordinator::new(&common)?.get(&format!("/v1/vms/{}/why", vm.name))?;
            show(&common, &answer, vm_view::why)?;
            Ok(0)
        }
        HandoffCommand::Drill { vm, route, common } => drill(&vm.name, &route, &common),
        HandoffCommand::Fence { vm, dead_host, reason, force, nominee, common } => {
            let mut body = json!({"dead_host": dead_host, "reason": reason, "force": force});
            if let Some(nominee) = &nominee {
                body["nominee"] = nominee.as_str().into();
            }
            let path = format!("/v1/vms/{}:fence", vm.name);
            let answer = Coordinator::new(&common)?.post(&path, Some(&body))?;
            show(&common, &answer, vm_view::fenced)?;
            Ok(if vm_view::others(&answer, nominee.as_deref()).is_empty() {
                0
            } else {
                EXIT_REFUSED
            })
        }
    }
}

fn show(
    common: &Coordinated,
    answer: &Value,
    view: impl FnOnce(&Value) -> String,
) -> Result<(), Failure> {
    print_text(&if common.json { format!("{answer:#}\n") } else { view(answer) })
}

fn path(coordinator: &Coordinator, which: &Which) -> Result<String, CoordinatorError> {
    let vm = &which.vm.name;
    let id = which.id.map_or_else(|| coordinator.latest(vm), Ok)?;
    Ok(format!("/v1/vms/{vm}/handoffs/{id}"))
}

fn prepare(
    coordinator: &Coordinator,
    vm: &str,
    id: HandoffId,
    route: &Route,
    (explicit, wait): (bool, bool),
) -> Result<Value, CoordinatorError> {
    let mode = if explicit { "explicit" } else { "implicit" };
    let mut body = json!({"to": route.to, "mode": mode, "ready_timeout": route.timeout});
    if let Some(from) = &route.from {
        body["from"] = from.clone().into();
    }
    let path = format!("/v1/vms/{vm}/handoffs/{id}");
    if !wait {
        return coordinator.put(&path, &body);
    }
    let end = Instant::now() + duration(&route.timeout) + SETTLING;
    let path = format!("{path}?wait=READY&timeout=60s");
    let mut row = coordinator.put(&path, &body)?;
    while row["state"] == "PREPARING" && !is_lost(&row) && Instant::now() < end {
        row = coordinator.get(&path)?;
    }
    Ok(row)
}

/// It failed, or is being taken back.
fn is_lost(row: &Value) -> bool {
    !row["because"].is_null()
}

/// Who owns the volumes afterwards is the exit status.
fn end(
    which: &Which,
    patience: &Patience,
    common: &Coordinated,
    (verb, body): (&str, Option<&Value>),
) -> Result<u8, Failure> {
    let coordinator = Coordinator::new(common)?;
    let path = path(&coordinator, which)?;
    let answer = coordinator.order(
        &format!("{path}:{verb}?timeout={}", patience.timeout),
        body,
        duration(&patience.timeout),
    );
    let row = match answer {
        Ok(row) => row,
        Err(error) => {
            let known = matches!(
                error.kind(),
                Some(
                    "baton:lost-race"
                        | "baton:unknown-frozen"
                        | "baton:not-ready"
                        | "baton:not-proven"
                )
            );
            if !known {
                return Err(error.into());
            }
            eprintln!("baton: {error}");
            coordinator.get(&path)?
        }
    };
    show(common, &row, vm_view::handoff)?;
    // Asked to be taken back and not answered yet: nobody can say.
    let open = row["decided"] == false && row["over"] == false;
    Ok(match row["outcome"].as_str() {
        Some("destination") => EXIT_DESTINATION,
        Some("source") if !open => 0,
        _ => EXIT_UNKNOWN,
    })
}

fn drill(vm: &str, route: &Route, common: &Coordinated) -> Result<u8, Failure> {
    let coordinator = Coordinator::new(common)?;
    let id = new_id()?;
    let ready = prepare(&coordinator, vm, id, route, (false, true))?;
    let path = format!("/v1/vms/{vm}/handoffs/{id}");
    let passed = ready["state"] == "READY" && !is_lost(&ready);
    let row = coordinator.post(&format!("{path}:cancel?timeout=60s"), None)?;
    let answer = json!({"passed": passed, "ready": ready, "after": row});
    show(common, &answer, vm_view::drill)?;
    Ok(if passed && row["outcome"] == "source" { 0 } else { EXIT_REFUSED })
}

/// Shows how far it is until nothing is left to do.
fn follow(
    coordinator: &Coordinator,
    vm: &str,
    id: HandoffId,
    quiet: bool,
) -> Result<Value, Failure> {
    let path = format!("/v1/vms/{vm}/handoffs/{id}");
    let live = std::io::stderr().is_terminal() && !quiet;
    let (mut shown, mut silent) = (String::new(), None);
    loop {
        let asked = Instant::now();
        match coordinator.get(&path) {
            Ok(row) => {
                silent = None;
                let line = phases::progress(&row);
                if line != shown && !quiet {
                    progress(&line, live);
                    shown = line;
                }
                if phases::is_over(&row) {
                    if live {
                        eprintln!();
                    }
                    return Ok(row);
                }
            }
            // The coordinator restarts: the migration goes on.
            Err(error) => {
                if silent.get_or_insert(asked).elapsed() > SILENT_MAX {
                    return Err(error.into());
                }
            }
        }
        std::thread::sleep(LOOK);
    }
}

fn progress(line: &str, live: bool) {
    let mut err = std::io::stderr().lock();
    // Nobody may be looking.
    let _ = if live { write!(err, "\r\x1b[K{line}") } else { writeln!(err, "{line}") };
    let _ = err.flush();
}

/// Leaves what is there as it is.
fn check_report(file: &Path) -> Result<(), Failure> {
    let new = !file.exists();
    let opened = std::fs::OpenOptions::new().append(true).create(true).open(file);
    opened.map_err(|source| Failure::Report { file: file.to_owned(), source })?;
    if new {
        // A refused migration has no report.
        let _ = std::fs::remove_file(file);
    }
    Ok(())
}
