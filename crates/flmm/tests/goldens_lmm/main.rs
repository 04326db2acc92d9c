//! Every LMM family with goldens, from picture and text to masks, in f32 and bf16 (`goldens/lmm/README.md`).

mod case;
#[path = "../common/mod.rs"]
mod common;
mod generation;
mod grounding;
mod several;

use candle_core::DType;
use flmm::lmm::REGISTRY;

use case::{Case, Opened, cases, families, open};
use common::{TestResult, golden_dir};
use generation::{check_conversation, check_generation};
use grounding::check_grounding;

fn check_families(
    suffix: &str,
    dtype: DType,
    check: impl Fn(&mut Case, &Opened) -> TestResult,
) -> TestResult {
    for (_, dir) in families()? {
        let opened = open(&dir, dtype)?;
        for mut case in cases(&dir, suffix)? {
            check(&mut case, &opened)?;
        }
    }
    Ok(())
}

#[test]
fn goldens_lmm_grounding_f32() -> TestResult {
    check_families("f32", DType::F32, check_grounding)
}

#[test]
fn goldens_lmm_grounding_bf16() -> TestResult {
    check_families("bf16", DType::BF16, check_grounding)
}

#[test]
fn goldens_lmm_generation_f32() -> TestResult {
    check_families("f32", DType::F32, check_generation)
}

#[test]
fn goldens_lmm_generation_bf16() -> TestResult {
    check_families("bf16", DType::BF16, check_generation)
}

#[test]
fn goldens_lmm_conversations_continue() -> TestResult {
    check_families("f32", DType::F32, check_conversation)
}

#[test]
fn goldens_lmm_every_registered_model_has_a_case() -> TestResult {
    let families = families()?;
    if golden_dir("lmm").is_none() {
        return Ok(());
    }
    for entry in REGISTRY {
        let found = families.iter().any(|(name, _)| *name == entry.spec.name);
        assert!(found, "{} has no golden", entry.spec.name);
    }
    Ok(())
}
