//! Which vector units the CPU has, and which of them the kernels use.

use std::sync::OnceLock;

/// A vector unit the kernels have code for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL and VNNI with FMA and F16C.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// NEON with the 8-bit dot products of Armv8.2.
    NeonDot,
    /// NEON, which every aarch64 CPU has.
    Neon,
    /// Whatever the compiler's baseline is.
    Portable,
}

impl Isa {
    /// Its name in [`VARIABLE`].
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::NeonDot => "neon-dot",
            Self::Neon => "neon",
            Self::Portable => "portable",
        }
    }
}

/// The environment variable that names the best unit to use, for tests and comparisons on a CPU that has better ones.
pub const VARIABLE: &str = "ATELIER_ISA";

/// The unit that is used: the best one.
#[must_use]
pub fn isa() -> Isa {
    found()[0]
}

/// All units this CPU can run, best first; none that is better than what [`VARIABLE`] names.
///
/// # Panics
/// When it names none of them.
#[must_use]
pub fn isas() -> Vec<Isa> {
    found().to_vec()
}

#[expect(
    clippy::disallowed_methods,
    reason = "no setting: it tells the tests of every crate, which have none, their unit"
)]
fn found() -> &'static [Isa] {
    static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();
    FOUND.get_or_init(|| match std::env::var(VARIABLE) {
        Ok(name) => from(detected(), &name),
        Err(_) => detected(),
    })
}

/// Of the units, best first, those from the one of this name on.
fn from(units: Vec<Isa>, name: &str) -> Vec<Isa> {
    let Some(at) = units.iter().position(|unit| unit.name() == name) else {
        let names: Vec<_> = units.iter().map(|unit| unit.name()).collect();
        panic!("{VARIABLE} is {name:?}; this CPU has {}", names.join(", "));
    };
    units[at..].to_vec()
}

fn detected() -> Vec<Isa> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        if avx512 {
            found.push(Isa::Avx512);
        }
        if avx2 {
            found.push(Isa::Avx2);
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            found.push(Isa::NeonDot);
        }
        found.push(Isa::Neon);
    }
    found.push(Isa::Portable);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leaves_its_unit_and_those_below() {
        let units = vec![Isa::Avx512, Isa::Avx2, Isa::Portable];
        assert_eq!(from(units.clone(), "avx2"), [Isa::Avx2, Isa::Portable]);
        assert_eq!(from(units.clone(), "portable"), [Isa::Portable]);
        for unknown in ["neon", "AVX2", ""] {
            assert!(std::panic::catch_unwind(|| from(units.clone(), unknown)).is_err(), "{unknown:?}");
        }
    }
}
