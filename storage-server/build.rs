//! The control of the fencing test: `BATON_NO_EPOCH_CHECK=1` at build time makes a server that lets every epoch in.
//! A variable and not RUSTFLAGS: nothing but this crate is built again.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=BATON_NO_EPOCH_CHECK");
    if std::env::var_os("BATON_NO_EPOCH_CHECK").is_some_and(|value| value == "1") {
        println!("cargo:rustc-cfg=baton_no_epoch_check");
    }
}
