//! Schedule and AdamW against a recorded trajectory (`optim`).

#[path = "../../flmm/tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;

use candle_core::Var;
use common::{Golden, TestResult, golden_dir, json};
use flmm_train::optim::{AdamW, AdamWConfig, Schedule};

#[test]
fn goldens_optim_schedule() -> TestResult {
    let Some(dir) = golden_dir("optim") else { return Ok(()) };
    let index = &json(&dir.join("index.json"))?["schedule"];
    let int = |key: &str| index[key].as_u64().ok_or(format!("index without `{key}`"));
    let float = |key: &str| index[key].as_f64().ok_or(format!("index without `{key}`"));
    let schedule = Schedule::epochs(float("base_lr")?, int("E")?, int("max_epochs")?, float("warmup_ratio")?);
    assert_eq!((schedule.warmup, schedule.total), (int("warmup_iters")?, int("total_iters")?));
    let golden = Golden::open(&dir.join("schedule.safetensors"))?;
    let recorded = golden.get("lr")?.to_vec1::<f64>()?;
    assert_eq!(recorded.len() as u64, schedule.total);
    for (k, expected) in recorded.iter().enumerate() {
        let lr = schedule.lr(k as u64);
        assert!((lr / expected - 1.0).abs() <= 1e-12, "iteration {k}: {lr} instead of {expected}");
    }
    Ok(())
}

#[test]
fn goldens_optim_trajectory() -> TestResult {
    let Some(dir) = golden_dir("optim") else { return Ok(()) };
    let index = &json(&dir.join("index.json"))?["trajectory"];
    let float = |key: &str| index[key].as_f64().ok_or(format!("index without `{key}`"));
    let beta = |i: usize| index["betas"][i].as_f64().ok_or("index without `betas`");
    let config = AdamWConfig {
        beta1: beta(0)?,
        beta2: beta(1)?,
        eps: float("eps")?,
        weight_decay: float("weight_decay")?,
        max_norm: float("clip")?,
    };
    let mut golden = Golden::open(&dir.join("trajectory.safetensors"))?;
    let names: Vec<String> = serde_json::from_value(index["tensors"].clone())?;
    let mut vars = BTreeMap::new();
    for name in &names {
        vars.insert(name.clone(), Var::from_tensor(golden.get(&format!("init.{name}"))?)?);
    }
    let mut adam = AdamW::new(vars, config)?;
    for step in index["steps"].as_array().ok_or("index without `steps`")? {
        let k = step["step"].as_u64().ok_or("no `step`")?;
        let lr = step["lr"].as_f64().ok_or("no `lr`")?;
        let mut grads = BTreeMap::new();
        for name in &names {
            grads.insert(name.clone(), golden.get(&format!("step{k}.grad.{name}"))?.clone());
        }
        let info = adam.step(&grads, lr)?;
        let norm = step["grad_norm_before_clip"].as_f64().ok_or("no norm")?;
        assert!((info.norm / norm - 1.0).abs() <= 1e-5, "step {k}: norm {} instead of {norm}", info.norm);
        for name in &names {
            golden.check(&format!("step{k}.param.{name}"), &adam.vars()[name].as_detached_tensor(), 2e-6)?;
        }
    }
    golden.finish()?;
    Ok(())
}
