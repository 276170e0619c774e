//! Packed adapters: the same to the bit, refused when they do not fit.
#![expect(clippy::unwrap_used, reason = "tests")]

mod fixtures;

use fixtures::{KINDS, contents, files, shape};
use kernels::codes_stride;
use peft::{Adapter, PagePool, Storage, packing};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use testkit::SmallBase;

const ALL: [Storage; 3] = [Storage::F32, Storage::Bf16, Storage::Int8];

fn load(kind: &str, storage: Storage) -> Adapter {
    let (config, weights) = files(kind);
    let base = SmallBase::new(shape(), [0; 32]);
    Adapter::load(&config, &weights, &base, storage, &mut || ()).unwrap()
}

#[test]
fn what_is_packed_is_the_same_to_the_bit() {
    let pool = PagePool::new(256 << 10, 4 << 20);
    for kind in KINDS {
        for storage in ALL {
            let adapter = load(kind, storage);
            let packed = adapter.pack();
            let mut pieces = 0;
            let again = Adapter::unpack(&packed, &shape(), &mut || pieces += 1).unwrap();
            assert!(pieces > 0, "{kind}");
            assert_eq!(contents(&again), contents(&adapter), "{kind} {storage:?}");
            assert_eq!(again.bytes(), adapter.bytes(), "{kind} {storage:?}");
            let paged = again.upload(&pool, &mut || ()).unwrap();
            assert_eq!(contents(&paged), contents(&adapter), "{kind} {storage:?}");
            assert!(paged.pack() == packed, "from pages as from memory: {kind} {storage:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for kind in KINDS {
        let packed = load(kind, Storage::Int8).pack();
        let unpack = |bytes: &[u8], shape| Adapter::unpack(bytes, &shape, &mut || ()).is_some();
        assert!(unpack(&packed, shape()), "{kind}");
        for cut in [0, 3, 4, 20, packed.len() - 1] {
            assert!(!unpack(&packed[..cut], shape()), "{kind} cut to {cut}");
        }
        assert!(!unpack(&[&packed[..], &[0]].concat(), shape()), "{kind} and more");
        let mut other = shape();
        other.dims = other.dims.map(|(out, input)| (out + 32, input + 32));
        assert!(!unpack(&packed, other), "{kind} for another base");
    }
    let few = peft::BaseShape { layers: 1, ..shape() };
    assert!(Adapter::unpack(&load("lora-all-linear", Storage::Bf16).pack(), &few, &mut || ()).is_none());
}

/// Bytes changed at random: refused, or an adapter whose tensors all have the lengths that the kernels rely on.
#[test]
fn damaged_bytes_do_no_harm() {
    let mut rng = StdRng::seed_from_u64(7);
    let (mut refused, mut taken) = (0, 0);
    for kind in KINDS {
        let packed = load(kind, Storage::Int8).pack();
        let header = 4 + u32::from_le_bytes(*packed.first_chunk().unwrap()) as usize;
        for _ in 0..2_000 {
            let mut damaged = packed.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..header);
                damaged[at] = if rng.random() { rng.random() } else { b'0' + rng.random_range(0..10) };
            }
            match Adapter::unpack(&damaged, &shape(), &mut || ()) {
                None => refused += 1,
                Some(adapter) => {
                    taken += 1;
                    let shape = shape();
                    for (id, site) in shape.site_ids().filter_map(|id| Some((id, adapter.site(id)?))) {
                        let (out, input) = shape.dims(id.site);
                        assert_eq!(site.b.len(), site.rank * out.next_multiple_of(16), "{kind}");
                        assert_eq!(site.a.len(), site.rank * codes_stride(input), "{kind}");
                    }
                }
            }
        }
    }
    assert!(refused > 1_000, "{refused} of {}", refused + taken);
}

#[test]
fn another_base_or_storage_is_another_packing() {
    let all: std::collections::HashSet<_> = ALL
        .into_iter()
        .flat_map(|storage| [packing(&[1; 32], storage), packing(&[2; 32], storage)])
        .collect();
    assert_eq!(all.len(), 6);
}
