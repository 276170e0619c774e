//! Tells Cargo to build again when a migration is added, as the migrations are compiled in.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
