//! Training makes no second copy of the base's weights, in any precision.
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "../../model/tests/support/synthetic.rs"]
mod synthetic;

use std::alloc::System;
use std::ops::ControlFlow;

use kernels::Format;
use model::{BaseModel, LoadOptions, load};
use peft::{AdapterConfig, Ia3Config, LoraConfig, PromptConfig, TargetModules};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use synthetic::Synthetic;
use train::{Control, Recipe, StepReport, TrainJob, Verdict, train_jointly};
use types::{Example, Site};

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Looks at what is allocated between the blocks of the model.
struct Watch<'a> {
    region: Region<'a, System>,
    /// The most bytes that were there at once.
    most: isize,
}

impl Watch<'_> {
    /// Bytes that were allocated so far, whether or not they were given back.
    fn all(&self) -> usize {
        self.region.change().bytes_allocated
    }

    fn look(&mut self) {
        let change = self.region.change();
        self.most = self.most.max(change.bytes_allocated as isize - change.bytes_deallocated as isize);
    }
}

impl Control for Watch<'_> {
    fn step(&mut self, _: usize, _: StepReport) -> Verdict {
        self.look();
        ControlFlow::Continue(())
    }

    fn breathe(&mut self) {
        self.look();
    }
}

fn watch() -> Watch<'static> {
    Watch { region: Region::new(COUNTING), most: 0 }
}

/// The weights of the linear layers as float32, which autograd over a dequantised copy would need.
fn copy(base: &BaseModel) -> Vec<Vec<f32>> {
    let linears = base.blocks().iter().flat_map(|block| &block.linears);
    let rows = linears.flat_map(|linear| (0..linear.weight.rows()).map(move |row| (linear, row)));
    rows.map(|(linear, row)| {
        let mut values = vec![0.0; linear.weight.cols()];
        linear.row(row, &mut values);
        values
    })
    .collect()
}

#[test]
fn training_adds_no_second_copy_of_the_weights() {
    let lora = |use_dora| {
        let target_modules = TargetModules::names(&Site::ALL.map(Site::module));
        AdapterConfig::Lora(LoraConfig { r: 2, use_dora, target_modules, ..LoraConfig::oppu() })
    };
    let examples = [Example { tokens: vec![1, 2, 3, 4, 5, 6], answer_start: 3 }];
    for formats in [&[Format::Q4_1], &[Format::Q8_0], &[Format::Bf16]] {
        let shape = Synthetic {
            hidden: 512,
            layers: 6,
            heads: 8,
            kv_heads: 2,
            feed_forward: 1536,
            vocab: 100,
            context: 64,
            window: None,
            formats,
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("synthetic.gguf");
        shape.write(&path, 1);
        let base = load(&path, LoadOptions::default()).unwrap().model;
        let weights = base.weight_bytes();
        let copied: usize = copy(&base).iter().map(|row| size_of_val(&row[..])).sum();
        for adapter in [
            lora(false),
            lora(true),
            AdapterConfig::Ia3(Ia3Config::llama()),
            AdapterConfig::Prompt(PromptConfig { virtual_tokens: 2 }),
        ] {
            let is_dora = matches!(&adapter, AdapterConfig::Lora(lora) if lora.use_dora);
            let recipe = Recipe { adapter, epochs: 1, ..Recipe::oppu() };
            let job = TrainJob { recipe: &recipe, start: None, examples: &examples, resume: None };
            let mut watch = watch();
            train_jointly(&base, &[job], &mut watch).swap_remove(0).unwrap();
            let (most, all) = (watch.most, watch.all());
            assert!(
                most > 0 && (most as usize) * 2 < weights,
                "{most} bytes at once beside {weights} of weights"
            );
            // Norms of DoRA's rows are taken one row at a time, of all rows; the others allocate less than such a copy
            // has even if nothing were given back.
            assert!(is_dora || all < copied, "{all} bytes in all beside {copied} of a copy");
        }
        // Negative control: a copy shows, at once and in all.
        let mut watch = watch();
        let copy = copy(&base);
        watch.look();
        assert!(watch.most as usize > weights && watch.all() >= copied);
        drop(copy);
    }
}
