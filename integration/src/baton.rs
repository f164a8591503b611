//! Baton's own daemons under test: a storage server with volumes, and backends on them.

use crate::daemon::Daemon;
use crate::workspace::program;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Environment variables of a program.
pub type Environment = Vec<(String, OsString)>;

/// For a daemon to say that it is ready, on a busy machine.
pub const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// A storage server. Killed when dropped.
#[derive(Debug)]
pub struct Storage {
    /// Its process.
    pub daemon: Daemon,
    dir: PathBuf,
    data_dir: PathBuf,
    more_args: Vec<String>,
    env: Environment,
    data: SocketAddr,
    admin: SocketAddr,
}

impl Storage {
    /// Starts one with its data in `dir/data`, on ports of its own.
    pub fn start(dir: &Path, more_args: &[&str]) -> Result<Self> {
        Self::start_in(dir, more_args, Environment::new())
    }

    /// [`Self::start`] with environment variables, which a restarted process gets too.
    pub fn start_in(dir: &Path, more_args: &[&str], env: Environment) -> Result<Self> {
        let data_dir = dir.join("data");
        let more_args: Vec<String> = more_args.iter().map(|&arg| arg.to_owned()).collect();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (daemon, data, admin) = launch(dir, &data_dir, &more_args, &env, any, any, |_| ())?;
        Ok(Self { daemon, dir: dir.to_owned(), data_dir, more_args, env, data, admin })
    }

    /// Starts it again on the same data and ports, after a kill or an end.
    pub fn restart(&mut self) -> Result<()> {
        self.restart_seen(|_| ())
    }

    /// [`Self::restart`] that tells of the process before it is ready: it may never be, where it stops itself.
    pub fn restart_seen(&mut self, seen: impl FnOnce(u32)) -> Result<()> {
        let (daemon, ..) = launch(
            &self.dir,
            &self.data_dir,
            &self.more_args,
            &self.env,
            self.data,
            self.admin,
            seen,
        )?;
        self.daemon = daemon;
        Ok(())
    }

    /// Variables of the process that is started next.
    pub fn set_environment(&mut self, env: Environment) {
        self.env = env;
    }

    /// Starts it again on the same ports with the data in another directory.
    pub fn restart_on(&mut self, data_dir: &Path) -> Result<()> {
        data_dir.clone_into(&mut self.data_dir);
        self.restart()
    }

    /// Kills it with no warning and starts it again.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.daemon.kill()?;
        self.restart()
    }

    /// Where clients connect.
    #[must_use]
    pub fn data_address(&self) -> SocketAddr {
        self.data
    }

    /// Where the admin API is.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// URI of a volume, by way of `through` (a proxy) or directly.
    #[must_use]
    pub fn uri(&self, volume: &str, through: Option<SocketAddr>) -> String {
        format!("baton://{}/{volume}", through.unwrap_or(self.data))
    }

    /// Makes a volume.
    pub fn create(&self, name: &str, size_bytes: u64) -> Result<Value> {
        self.post("/v1/volumes", &json!({"name": name, "size_bytes": size_bytes}))
    }

    /// Makes a volume larger.
    pub fn resize(&self, name: &str, size_bytes: u64) -> Result<Value> {
        self.post(&format!("/v1/volumes/{name}/resize"), &json!({"size_bytes": size_bytes}))
    }

    /// Takes the volume from its owner by force.
    pub fn fence(&self, name: &str, nominee: Option<&str>) -> Result<Value> {
        self.post(
            &format!("/v1/volumes/{name}/fence"),
            &json!({"reason": "test", "nominee": nominee}),
        )
    }

    /// What the server says of a volume.
    pub fn show(&self, name: &str) -> Result<Value> {
        let mut response = agent().get(self.url(&format!("/v1/volumes/{name}"))).call()?;
        Ok(response.body_mut().read_json()?)
    }

    /// One number of `/metrics`: the sum over all labels.
    pub fn metric(&self, name: &str) -> Result<f64> {
        self.sum_of(name, "")
    }

    /// [`Self::metric`] over what has this label.
    pub fn metric_of(&self, name: &str, label: &str, value: &str) -> Result<f64> {
        self.sum_of(name, &format!("{label}=\"{value}\""))
    }

    fn sum_of(&self, name: &str, label: &str) -> Result<f64> {
        let text = agent().get(self.url("/metrics")).call()?.body_mut().read_to_string()?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let found = rest.starts_with(['{', ' ']) && rest.contains(label);
            found.then(|| line.rsplit(' ').next()?.parse::<f64>().ok())?
        });
        let values: Vec<f64> = values.collect();
        if values.is_empty() {
            bail!("the server has no metric {name} {label}");
        }
        Ok(values.iter().sum())
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }

    /// Asks something of the admin API.
    pub fn get(&self, path: &str) -> Result<Value> {
        let mut response = agent().get(self.url(path)).call()?;
        let text = response.body_mut().read_to_string()?;
        if !response.status().is_success() {
            bail!("GET {path}: {} {text}", response.status());
        }
        Ok(serde_json::from_str(&text)?)
    }

    /// Says something to the admin API.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let mut response = agent().post(self.url(path)).send_json(body)?;
        let text = response.body_mut().read_to_string()?;
        if !response.status().is_success() {
            bail!("POST {path}: {} {text}", response.status());
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder();
    let config = config.timeout_global(Some(Duration::from_secs(20))).http_status_as_error(false);
    config.build().into()
}

fn launch(
    dir: &Path,
    data_dir: &Path,
    more_args: &[String],
    env: &Environment,
    data: SocketAddr,
    admin: SocketAddr,
    seen: impl FnOnce(u32),
) -> Result<(Daemon, SocketAddr, SocketAddr)> {
    let mut args: Vec<OsString> = ["--listen".into(), data.to_string().into()].to_vec();
    args.extend(["--admin-listen".into(), admin.to_string().into()]);
    args.extend(["--data-dir".into(), data_dir.into()]);
    args.extend(more_args.iter().map(OsString::from));
    let mut command = Command::new(program("baton-storage")?);
    command.args(with_polling(args)).envs(env.iter().map(|(name, value)| (name, value)));
    let mut daemon = Daemon::start_command(dir, "storage", command)?;
    seen(daemon.pid());
    let line = daemon.wait_line("listening data=", READY_TIMEOUT)?;
    let address = |key: &str| -> Result<SocketAddr> {
        let text = line.split_whitespace().find_map(|word| word.strip_prefix(key));
        text.with_context(|| format!("no {key} in `{line}`"))?.parse().context("not an address")
    };
    let (data, admin) = (address("data=")?, address("admin=")?);
    Ok((daemon, data, admin))
}

/// A backend with one disk. Killed when dropped.
#[derive(Debug)]
pub struct Backend {
    /// Its process.
    pub daemon: Daemon,
    /// Where a VMM connects.
    pub socket: PathBuf,
    dir: PathBuf,
    name: String,
    args: Vec<OsString>,
}

impl Backend {
    /// Serves `volume` at `dir/NAME.sock`.
    pub fn start(dir: &Path, name: &str, volume: &str, more_args: &[&str]) -> Result<Self> {
        let socket = dir.join(format!("{name}.sock"));
        let mut args: Vec<OsString> = ["--socket-path".into(), socket.clone().into()].to_vec();
        args.extend(["--volume".into(), volume.into()]);
        args.extend(more_args.iter().map(OsString::from));
        let daemon = launch_backend(dir, name, &args)?;
        Ok(Self { daemon, socket, dir: dir.to_owned(), name: name.to_owned(), args })
    }

    /// Starts it again with the same arguments, after a kill or an end.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon = launch_backend(&self.dir, &self.name, &self.args)?;
        Ok(())
    }

    /// Kills it with no warning and starts it again.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.daemon.kill()?;
        self.restart()
    }
}

fn launch_backend(dir: &Path, name: &str, args: &[OsString]) -> Result<Daemon> {
    let args = with_polling(args.to_vec());
    let mut daemon = Daemon::start(dir, name, &program("baton-backend")?, &args)?;
    daemon.wait_line("listening socket=", READY_TIMEOUT)?;
    Ok(daemon)
}

/// `BATON_POLL_US` runs whatever is started here with busy polling, unless its arguments say something of that.
pub(crate) fn with_polling(mut args: Vec<OsString>) -> Vec<OsString> {
    if let Some(poll_us) = std::env::var_os("BATON_POLL_US")
        && !args.iter().any(|arg| arg == "--poll-us")
    {
        args.extend(["--poll-us".into(), poll_us]);
    }
    args
}

/// Waits until `holds`, looking every few milliseconds.
pub fn wait_until(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + timeout;
    while !holds() {
        if Instant::now() > deadline {
            bail!("waited {timeout:?} in vain: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
