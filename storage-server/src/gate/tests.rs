//! `RUSTFLAGS="--cfg loom" cargo test -p baton-storage-server --lib gate` runs the
//! proofs; without the flag only the plain tests run.

use super::*;

#[cfg(not(loom))]
mod plain {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc;

    #[test]
    fn only_the_open_epoch_of_each_principal_enters() {
        let gate: Gate = Gate::new(2);
        let enters = |principal, epoch| Gate::admit(&gate, 0, principal, Epoch(epoch)).is_some();
        assert!(!enters(Principal::Owner, 0), "a new gate is closed");
        gate.open(Some(Epoch(5)), Some(Epoch(5)));
        for (epoch, open) in [(0, false), (4, false), (5, true), (6, false), (u64::MAX, false)] {
            assert_eq!(enters(Principal::Owner, epoch), open, "{epoch}");
            assert_eq!(enters(Principal::Reader, epoch), open, "{epoch}");
        }
        gate.close(|_| ());
        gate.open(None, Some(Epoch(5)));
        assert!(!enters(Principal::Owner, 5), "given back");
        assert!(enters(Principal::Reader, 5));
        gate.close(|_| ());
        assert!(!enters(Principal::Owner, CLOSED) && !enters(Principal::Reader, CLOSED));
        assert_eq!(gate.inside(), 0, "a refused request leaves nothing behind");
    }

    #[test]
    fn close_waits_for_every_pass_and_its_copies() {
        let gate: Arc<Gate> = Arc::new(Gate::new(2));
        gate.open(Some(Epoch(1)), Some(Epoch(1)));
        let batch = Gate::admit(&*gate, 1, Principal::Owner, Epoch(1)).expect("open");
        let elsewhere = batch.share(Arc::clone(&gate));
        drop(batch);
        let (tell, told) = mpsc::channel();
        let closer = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                gate.close(|_| ());
                tell.send(()).expect("the test waits");
            }
        });
        while Gate::admit(&*gate, 0, Principal::Owner, Epoch(1)).is_some() {
            std::thread::yield_now();
        }
        assert!(!gate.try_close(), "one is inside");
        assert!(told.recv_timeout(Duration::from_millis(100)).is_err(), "one is inside");
        drop(elsewhere);
        told.recv_timeout(Duration::from_secs(10)).expect("drained");
        closer.join().expect("no panic");
        assert!(gate.try_close(), "nobody is");
    }
}

#[cfg(loom)]
mod proof {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    #[derive(Debug)]
    struct CheckFirst;
    impl Rules for CheckFirst {
        const CHECK_FIRST: bool = true;
    }

    #[derive(Debug)]
    struct PlainLook;
    impl Rules for PlainLook {
        const PLAIN_LOOK: bool = true;
    }

    struct World<R: Rules> {
        gate: Gate<R>,
        /// What admitted requests change. Loom reports any access that is not
        /// ordered against another one.
        disk: UnsafeCell<u32>,
    }

    // SAFETY: the cell is the thing under test; loom checks each access.
    unsafe impl<R: Rules + Send> Sync for World<R> {}

    /// Requests of epoch 1 run against a close and the first request of epoch
    /// 2. An old request that is inside after the close is a data race.
    fn takeover<R: Rules + Send + 'static>() {
        takeover_by::<R>(|gate| gate.close(|_| ()));
    }

    fn takeover_by<R: Rules + Send + 'static>(close: fn(&Gate<R>)) {
        loom::model(move || {
            let world = Arc::new(World { gate: Gate::<R>::new(2), disk: UnsafeCell::new(0) });
            world.gate.open(Some(Epoch(1)), Some(Epoch(1)));
            let old = thread::spawn({
                let world = Arc::clone(&world);
                move || {
                    if let Some(_pass) = Gate::admit(&world.gate, 0, Principal::Owner, Epoch(1)) {
                        // SAFETY: loom checks that nobody else is at it.
                        world.disk.with_mut(|disk| unsafe { *disk = 1 });
                    }
                }
            });
            close(&world.gate);
            world.gate.open(Some(Epoch(2)), Some(Epoch(2)));
            let pass = Gate::admit(&world.gate, 1, Principal::Owner, Epoch(2)).expect("open");
            // SAFETY: loom checks that nobody else is at it.
            world.disk.with_mut(|disk| unsafe { *disk = 2 });
            drop(pass);
            old.join().expect("no panic");
        });
    }

    #[test]
    fn no_old_request_is_inside_after_close() {
        takeover::<Real>();
    }

    /// The way of a change that would rather not block.
    #[test]
    fn no_old_request_is_inside_after_a_close_that_was_tried_first() {
        takeover_by::<Real>(|gate| {
            if !gate.try_close() {
                gate.close(|_| ());
            }
        });
    }

    #[test]
    #[should_panic(expected = "Causality violation")]
    fn the_model_sees_a_try_that_may_be_old() {
        takeover_by::<PlainLook>(|gate| {
            if !gate.try_close() {
                gate.close(|_| ());
            }
        });
    }

    #[test]
    #[should_panic(expected = "Causality violation")]
    fn the_model_sees_a_check_before_the_count() {
        takeover::<CheckFirst>();
    }

    #[test]
    #[should_panic(expected = "Causality violation")]
    fn the_model_sees_a_look_that_may_be_old() {
        takeover::<PlainLook>();
    }

    /// A shared pass, dropped on another thread, wakes the closer (a lost
    /// wake-up is a deadlock, which loom reports).
    #[test]
    fn a_pass_that_ends_elsewhere_counts_and_wakes() {
        loom::model(|| {
            let world = Arc::new(World { gate: Gate::<Real>::new(1), disk: UnsafeCell::new(0) });
            world.gate.open(Some(Epoch(1)), None);
            let pass = Gate::admit(&world.gate, 0, Principal::Owner, Epoch(1)).expect("open");
            let elsewhere = thread::spawn({
                let world = Arc::clone(&world);
                let shared = pass.share(LoomGate(Arc::clone(&world)));
                move || {
                    // SAFETY: loom checks that nobody else is at it.
                    world.disk.with_mut(|disk| unsafe { *disk = 1 });
                    drop(shared);
                }
            });
            drop(pass);
            world.gate.close(|_| ());
            // SAFETY: loom checks that nobody else is at it.
            world.disk.with_mut(|disk| unsafe { *disk = 2 });
            elsewhere.join().expect("no panic");
        });
    }

    struct LoomGate(Arc<World<Real>>);
    impl Deref for LoomGate {
        type Target = Gate<Real>;
        fn deref(&self) -> &Gate<Real> {
            &self.0.gate
        }
    }
}
