//! Whether the disks of a VM can move together, by how their storage keeps a host
//! from them. Pure: from the disks' URIs alone, before anybody is asked anything.

use baton_remote_client::{Engine, VolumeUri};

use super::vm_view::DiskView;

/// Why they cannot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Immovable {
    /// The driver would not open it either.
    #[error("disk `{disk}`: {why}")]
    Uri {
        /// Its name in the VM.
        disk: String,
        /// What is wrong with its URI.
        why: String,
    },
    /// Its storage cannot hand over at all.
    #[error(
        "disk `{disk}` is on {volume}, and a running VM cannot take such a disk to another host"
    )]
    Engine {
        /// Its name in the VM.
        disk: String,
        /// Its URI.
        volume: String,
    },
    /// No decision covers both.
    #[error(
        "disk `{}` ({}) is fenced {}, disk `{}` ({}) {}: no single decision covers both, so they cannot move together",
        .0[0].name, .0[0].volume, .1[0].capabilities().fence.words(),
        .0[1].name, .0[1].volume, .1[1].capabilities().fence.words()
    )]
    Mixed(Box<[DiskView; 2]>, [Engine; 2]),
}

/// The engine of each disk, if all can move together.
///
/// # Errors
/// [`Immovable`]. A mixture is named before what an engine cannot do by itself.
pub(super) fn engines(disks: &[DiskView]) -> Result<Vec<Engine>, Immovable> {
    let mut engines = Vec::with_capacity(disks.len());
    for disk in disks {
        let uri: VolumeUri = disk
            .volume
            .parse()
            .map_err(|error| Immovable::Uri { disk: disk.name.clone(), why: format!("{error}") })?;
        engines.push(uri.engine());
    }
    let fence = |engine: &Engine| engine.capabilities().fence;
    for (disk, engine) in disks.iter().zip(&engines).skip(1) {
        if fence(engine) != fence(&engines[0]) {
            let both = Box::new([disks[0].clone(), disk.clone()]);
            return Err(Immovable::Mixed(both, [engines[0], *engine]));
        }
    }
    match disks.iter().zip(&engines).find(|(_, engine)| !engine.capabilities().handoff) {
        Some((disk, _)) => {
            Err(Immovable::Engine { disk: disk.name.clone(), volume: disk.volume.clone() })
        }
        None => Ok(engines),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(volumes: &[&str]) -> Vec<DiskView> {
        let disk = |(n, volume): (usize, &&str)| DiskView {
            name: format!("disk{n}"),
            volume: (*volume).to_owned(),
        };
        volumes.iter().enumerate().map(disk).collect()
    }

    const OF_EACH: [(&str, Engine); 4] = [
        ("baton://h:1/v", Engine::Baton),
        ("nbd://h/e", Engine::Nbd),
        ("rbd://p/i", Engine::Rbd),
        ("file:///f", Engine::File),
    ];

    /// Every pair of engines: together exactly where one fence covers both and the
    /// driver can hand over.
    #[test]
    fn every_pair_of_engines() {
        for (one, of_one) in OF_EACH {
            for (other, of_other) in OF_EACH {
                let found = engines(&disks(&[one, other]));
                let (of, with) = (of_one.capabilities(), of_other.capabilities());
                if of.fence.moves_with(with.fence) && of.handoff && with.handoff {
                    assert_eq!(found, Ok(vec![of_one, of_other]), "{one}, {other}");
                } else if of.fence == with.fence {
                    assert!(matches!(found, Err(Immovable::Engine { .. })), "{one}, {other}");
                } else {
                    assert!(
                        matches!(found, Err(Immovable::Mixed(..))),
                        "{one}, {other}: {found:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_mixture_names_both_disks_wherever_they_are() {
        let mixed = disks(&["baton://h:1/a", "baton://h:1/b", "nbd://h/e"]);
        let said = engines(&mixed).expect_err("mixed").to_string();
        for part in
            ["`disk0` (baton://h:1/a) is fenced by its storage server", "`disk2` (nbd://h/e)"]
        {
            assert!(said.contains(part), "{said}");
        }
        assert!(matches!(engines(&disks(&["sheepdog://x"])), Err(Immovable::Uri { .. })));
    }
}
