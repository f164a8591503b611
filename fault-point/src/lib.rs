//! Named points at which a test kills or stops the process.
//!
//! ```text
//!   BATON_FAULT_POINT=seal.closed=kill      SIGKILL at the first pass
//!   BATON_FAULT_POINT=seal.closed=stop@3    SIGSTOP at the third
//!   BATON_FAULT_HITS=FILE                   one line per pass of any point
//! ```
//!
//! Without the feature `enabled`, which no release has, [`at`] is empty and the
//! environment is not looked at. Does not know what the points mean.

/// Passes the point `name`.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub const fn at(_name: &str) {}

#[cfg(feature = "enabled")]
pub use enabled::at;

#[cfg(feature = "enabled")]
mod enabled {
    use std::fs::{File, OpenOptions};
    use std::io::Write;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// What is to happen where.
    #[derive(Debug, PartialEq, Eq)]
    struct Fault {
        point: String,
        signal: libc::c_int,
        /// At which pass, from 1.
        pass: u64,
    }

    impl Fault {
        fn parse(text: &str) -> Option<Self> {
            let (point, what) = text.rsplit_once('=')?;
            let (what, pass) = what.split_once('@').unwrap_or((what, "1"));
            let signal = match what {
                "kill" => libc::SIGKILL,
                "stop" => libc::SIGSTOP,
                _ => return None,
            };
            Some(Self { point: point.to_owned(), signal, pass: pass.parse().ok()? })
        }
    }

    #[derive(Debug)]
    struct Settings {
        fault: Option<Fault>,
        passes: AtomicU64,
        hits: Option<File>,
    }

    fn settings() -> &'static Settings {
        static SETTINGS: OnceLock<Settings> = OnceLock::new();
        SETTINGS.get_or_init(|| {
            let fault = std::env::var("BATON_FAULT_POINT").ok();
            let fault = fault.map(|text| {
                Fault::parse(&text).unwrap_or_else(|| {
                    panic!("BATON_FAULT_POINT is not POINT=kill|stop[@N]: {text}")
                })
            });
            let hits = std::env::var_os("BATON_FAULT_HITS").map(|path| {
                let file = OpenOptions::new().create(true).append(true).open(&path);
                file.unwrap_or_else(|error| panic!("BATON_FAULT_HITS {path:?}: {error}"))
            });
            Settings { fault, passes: AtomicU64::new(0), hits }
        })
    }

    /// Passes the point `name`.
    pub fn at(name: &str) {
        let settings = settings();
        if let Some(mut hits) = settings.hits.as_ref() {
            // One write, so that lines of several processes do not mix.
            let _ = hits.write_all(format!("{name}\n").as_bytes());
        }
        let Some(fault) = settings.fault.as_ref().filter(|fault| fault.point == name) else {
            return;
        };
        if settings.passes.fetch_add(1, Ordering::Relaxed) + 1 == fault.pass {
            raise(fault.signal);
        }
    }

    fn raise(signal: libc::c_int) {
        // SAFETY: no memory is involved. To the whole process, not to this thread.
        unsafe { libc::kill(libc::getpid(), signal) };
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn faults_as_tests_write_them() {
            let fault = |point: &str, signal, pass| Fault { point: point.to_owned(), signal, pass };
            assert_eq!(Fault::parse("a.b=kill"), Some(fault("a.b", libc::SIGKILL, 1)));
            assert_eq!(Fault::parse("a.b=stop@3"), Some(fault("a.b", libc::SIGSTOP, 3)));
            for text in ["", "a.b", "a.b=term", "a.b=kill@x", "kill"] {
                assert_eq!(Fault::parse(text), None, "{text}");
            }
        }
    }
}
