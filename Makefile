# Each target is one script or one cargo command; look there for what it needs and how it ends.
.PHONY: help build demo demo-splitbrain test test-debian13 faults faults-baton faults-rbd bench bench-unix bench-engines bench-parts bench-fair bench-polling bench-dirty-log bench-cost bench-idle bench-handoff bench-micro bench-scale check

help:
	@echo 'make demo    a real guest on a storage server, with accidents, and a report (under 3 minutes after the build)'
	@echo 'make demo-splitbrain   what a live migration gone wrong does to a volume, on real guests (a minute after the build)'
	@echo 'make test    every test, as CI runs them'
	@echo 'make test-debian13   those of engines and guests on the Ceph, etcd, QEMU and NBD servers of Debian 13, in a root of its own (needs root and debootstrap)'
	@echo 'make faults  every process of a migration killed and frozen at every message, on volumes of our own and on RBD (hours; ENGINE=baton or rbd for one of them)'
	@echo 'make bench   side by side with qemu-storage-daemon, as tables of ratios (DOCS=1 writes them into docs/performance.md)'
	@echo 'make bench-unix   the same over Unix sockets'
	@echo 'make bench-engines   Baton on NBD, with TLS and without, and on Ceph, against the same of the peer (a part of make bench)'
	@echo 'make bench-parts   the backend on a volume that does nothing and on a local file, against the same of the peer'
	@echo 'make bench-fair   how evenly full queues are served, and what a busy neighbour costs a tenant'
	@echo 'make bench-polling   what busy polling brings, and what it takes'
	@echo 'make bench-dirty-log   what keeping a dirty log costs'
	@echo 'make bench-cost   instructions, system calls and allocations of a request, against what is stored (a minute after the build)'
	@echo 'make bench-idle   what 100 backends with idle guests cost a host'
	@echo 'make bench-handoff   what moving a disk costs the guest, as a table (minutes; writes docs/performance.md)'
	@echo 'make bench-micro   ring, codec, gate and extent map by themselves, in ns (criterion)'
	@echo 'make bench-scale   what a request costs as queues, volumes and their sizes grow'
	@echo 'make check   formatting and lints'
	@echo 'make build   the programs, in target/release'

build:
	cargo build --release --workspace --bins

demo:
	@scripts/demo.sh

demo-splitbrain:
	@scripts/demo-splitbrain.sh

test:
	@.ci/run

test-debian13:
	@scripts/on-debian13.sh

faults: $(if $(ENGINE),faults-$(ENGINE),faults-baton faults-rbd)

faults-baton:
	@scripts/faults.sh --freeze-ms 10000 --jobs 8
	@BATON_PING_PONG=1000 cargo test --quiet -p baton-integration --test scenarios f18
	@BATON_VOLUMES=100 BATON_MOVES=32 cargo test --quiet -p baton-integration --test scenarios f9
	@BATON_STORM=100 cargo test --quiet -p baton-integration --test storms f10

# Each job has a cluster of its own, which wants a core half of the time.
faults-rbd:
	@scripts/faults.sh --engine rbd --freeze-ms 10000 --jobs 4

bench:
	@scripts/bench.sh $(if $(DOCS),--write-docs)
	@$(MAKE) --no-print-directory bench-engines

bench-cost:
	@scripts/bench-cost.sh $(if $(BLESS),--bless)

bench-unix:
	@scripts/bench.sh --a baton-unix --b qsd-nbdkit-unix $(if $(DOCS),--write-docs)

bench-engines:
	@scripts/bench.sh engine --a baton-nbd --b qsd-nbdkit --only 4k $(if $(DOCS),--write-docs)
	@scripts/bench.sh engine --a baton-nbd-tls --b qsd-nbdkit-tls --only 4k $(if $(DOCS),--write-docs)
	@scripts/bench.sh engine --a baton-rbd --b qsd-rbd --only 4k $(if $(DOCS),--write-docs)

bench-parts:
	@scripts/bench.sh --a baton-null --b qsd-null $(if $(DOCS),--write-docs)
	@scripts/bench.sh --a baton-file --b qsd-file-uring $(if $(DOCS),--write-docs)

bench-fair:
	@scripts/bench.sh fair $(if $(DOCS),--write-docs)
	@scripts/bench.sh tenants $(if $(DOCS),--write-docs)

bench-polling:
	@scripts/bench.sh polling $(if $(DOCS),--write-docs)

bench-dirty-log:
	@scripts/bench.sh dirty-log $(if $(DOCS),--write-docs)

bench-idle:
	cargo build --release --workspace --bins
	BATON_BIN_DIR=$${CARGO_TARGET_DIR:-target}/release cargo run --release --quiet -p baton-integration --bin baton-bench -- idle

bench-handoff:
	@scripts/bench-handoff.sh

bench-scale:
	cargo build --release --workspace --bins
	BATON_BIN_DIR=$${CARGO_TARGET_DIR:-target}/release cargo run --release --quiet -p baton-integration --bin baton-bench -- scale

bench-micro:
	cargo bench -p baton-backend -p baton-protocol -p baton-storage-server --benches

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
