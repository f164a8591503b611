//! `baton-storage`: arguments, configuration, run.

#[cfg(not(loom))]
fn main() -> std::process::ExitCode {
    run::main()
}

/// The daemon is not part of the loom proofs.
#[cfg(loom)]
fn main() {}

#[cfg(not(loom))]
mod run {
    use std::io::Write;
    use std::process::ExitCode;

    use baton_storage_server::config::{Config, Flags, LogFormat};
    use baton_storage_server::server;
    use clap::Parser;
    use tokio::signal::unix::{SignalKind, signal};

    /// Wrong flags or configuration; clap uses the same number.
    const USAGE: u8 = 2;
    /// Could not start, or failed while running.
    const FAILED: u8 = 1;

    pub(super) fn main() -> ExitCode {
        let config = match Config::load(Flags::parse()) {
            Ok(config) => config,
            Err(error) => return fail(USAGE, &error),
        };
        start_logging(&config);
        if cfg!(baton_no_epoch_check) {
            tracing::error!(
                "this build is the control of a test: it lets every epoch in and fences nobody"
            );
        }
        // A worker that panics has broken a promise: the clients are better off
        // with a restarted server than with one that has lost a part.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            hook(info);
            std::process::abort();
        }));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("control")
            .enable_all()
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return fail(FAILED, &error),
        };
        let code = runtime.block_on(serve(config));
        // A task that still waits for the disk must not keep the process.
        runtime.shutdown_background();
        code
    }

    async fn serve(config: Config) -> ExitCode {
        let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
        let (mut terminate, mut interrupt) = match signals {
            (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
            (Err(error), _) | (_, Err(error)) => return fail(FAILED, &error),
        };
        let server = match server::start(config).await {
            Ok(server) => server,
            Err(error) => return fail(FAILED, &error),
        };
        let unix =
            server.unix.as_ref().map_or(String::new(), |path| format!(" unix={}", path.display()));
        say(&format!("listening data={} admin={}{unix}", server.data, server.admin));
        // Fails only without systemd.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        tracing::info!("stopping: draining, flushing, writing a checkpoint");
        match server.stop().await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(FAILED, &error),
        }
    }

    fn start_logging(config: &Config) {
        let builder = tracing_subscriber::fmt()
            .with_max_level(config.log_level)
            .with_writer(std::io::stderr)
            .with_target(false)
            // A log that cannot be written, on a full disk, must not end who writes it.
            .log_internal_errors(false);
        match config.log_format {
            LogFormat::Text => builder.with_ansi(false).init(),
            LogFormat::Json => builder.json().init(),
        }
    }

    /// One sentence, with its causes.
    fn fail(code: u8, error: &dyn std::error::Error) -> ExitCode {
        let mut text = format!("baton-storage: {error}");
        let mut source = error.source();
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        say(text.trim_end());
        ExitCode::from(code)
    }

    fn say(line: &str) {
        // Nobody may be listening any more.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}
