//! How the program is linked.

fn main() {
    // Tables of lines make two thirds of a release build. They stay in it, for backtraces, and are read when one is made.
    if std::env::var("PROFILE").as_deref() == Ok("release") {
        println!("cargo:rustc-link-arg-bins=-Wl,--compress-debug-sections=zlib");
    }
    println!("cargo:rerun-if-changed=build.rs");
}
