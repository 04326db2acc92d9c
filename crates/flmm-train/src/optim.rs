//! AdamW with decoupled weight decay, global-norm clipping and the learning-rate schedule (`spec/training.md` §5).

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use flmm::{Error, Result};

use crate::adamw::Update;

/// Trained tensors by checkpoint name.
pub type Vars = BTreeMap<String, Var>;

/// Gradients by checkpoint name; a missing name is a zero gradient.
pub type Gradients = BTreeMap<String, Tensor>;

/// The gradients that a backward pass left for `vars`, detached from its graph.
pub fn gradients(store: &GradStore, vars: &Vars) -> Gradients {
    let found = vars.iter().filter_map(|(name, var)| Some((name, store.get(var)?)));
    found.map(|(name, grad)| (name.clone(), grad.detach())).collect()
}

/// `total += scale · term`, for gradients summed over a batch or over workers.
pub fn accumulate(total: &mut Gradients, term: &Gradients, scale: f64) -> Result<()> {
    for (name, grad) in term {
        let grad = if scale == 1.0 { grad.clone() } else { (grad * scale)? };
        let sum = match total.get(name) {
            Some(sum) => (sum + grad)?,
            None => grad,
        };
        total.insert(name.clone(), sum);
    }
    Ok(())
}

/// The L2 norm of all gradients together.
pub fn global_norm(gradients: &Gradients) -> Result<f64> {
    let squares = gradients.values().map(squared_norm).sum::<Result<f64>>()?;
    Ok(squares.sqrt())
}

fn squared_norm(grad: &Tensor) -> Result<f64> {
    Ok(f64::from(grad.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()?))
}

/// Settings of [`AdamW`]; the defaults are the paper's.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay, applied to every tensor (norms and biases included).
    pub weight_decay: f64,
    /// Largest global L2 norm of the gradients; infinity does not clip.
    pub max_norm: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, max_norm: 1.0 }
    }
}

/// Tensors that are trained differently from the rest: those whose names begin with `prefix`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// Beginning of the names, `sam.model.mask_decoder.`; of several groups that fit, the first counts.
    pub prefix: String,
    /// Factor of the learning rate.
    #[serde(default = "one")]
    pub learning_rate: f64,
    /// Factor of the weight decay.
    #[serde(default = "one")]
    pub weight_decay: f64,
    /// Whether these gradients are clipped by their own norm. They then change nothing about the other tensors.
    #[serde(default)]
    pub own_norm: bool,
}

fn one() -> f64 {
    1.0
}

/// AdamW over named tensors.
///
/// One step: clip all gradients to the global norm, `p ← p · (1 − lr · wd)`, update the moments,
/// `p ← p − lr · m̂ / (√v̂ + ε)`. A tensor without a gradient is treated as having a zero one.
pub struct AdamW {
    vars: Vars,
    config: AdamWConfig,
    groups: Vec<ParamGroup>,
    /// First and second moment by name, f32.
    moments: BTreeMap<String, (Tensor, Tensor)>,
    steps: u64,
}

/// What one step saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepInfo {
    /// Global norm of the gradients before clipping, groups with a norm of their own left out.
    pub norm: f64,
    /// What those were multiplied with, at most 1.
    pub clip: f64,
}

impl AdamW {
    /// An optimiser at step 0 for f32 tensors.
    pub fn new(vars: Vars, config: AdamWConfig) -> Result<Self> {
        let mut moments = BTreeMap::new();
        for (name, var) in &vars {
            if var.dtype() != DType::F32 {
                return Err(Error::request(
                    format!("cannot train `{name}` in {:?}", var.dtype()),
                    "trained tensors must be f32",
                ));
            }
            let zeros = var.as_tensor().zeros_like()?.detach();
            moments.insert(name.clone(), (zeros.clone(), zeros));
        }
        Ok(Self { vars, config, groups: Vec::new(), moments, steps: 0 })
    }

    /// Trains some tensors differently.
    ///
    /// # Errors
    /// [`Error::Request`] if no tensor belongs to a group, or a factor is negative or not finite.
    pub fn with_groups(mut self, groups: Vec<ParamGroup>) -> Result<Self> {
        for group in &groups {
            let prefix = &group.prefix;
            if !self.vars.keys().any(|name| name.starts_with(prefix)) {
                return Err(Error::request(
                    format!(
                        "no trained tensor's name begins with `{prefix}`, the prefix of a parameter group"
                    ),
                    "names are those of the head: `mask_head.`, `text_proj.`, `sam.model.`, `keyword_selector.`",
                ));
            }
            for factor in [group.learning_rate, group.weight_decay] {
                if !(factor.is_finite() && factor >= 0.0) {
                    let what = format!("a factor of the parameter group `{prefix}` is {factor}");
                    return Err(Error::request(what, "give a number from 0"));
                }
            }
        }
        self.groups = groups;
        Ok(self)
    }

    /// The group of a tensor.
    fn group(&self, name: &str) -> Option<&ParamGroup> {
        self.groups.iter().find(|group| name.starts_with(&group.prefix))
    }

    /// The trained tensors.
    pub fn vars(&self) -> &Vars {
        &self.vars
    }

    /// The number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Takes one step at learning rate `lr`.
    ///
    /// Fails, leaving every tensor as it was, when a gradient is not finite or belongs to no trained tensor.
    pub fn step(&mut self, gradients: &Gradients, lr: f64) -> Result<StepInfo> {
        if let Some(name) = gradients.keys().find(|name| !self.vars.contains_key(*name)) {
            return Err(Error::request(
                format!("gradient for `{name}`, which is not trained"),
                "pass gradients of the optimiser's own tensors",
            ));
        }
        // Squared norms of the groups that have their own, by prefix, and of all other tensors together.
        let mut squares = BTreeMap::from([(None, 0f64)]);
        let own =
            |name: &str| self.group(name).filter(|group| group.own_norm).map(|group| group.prefix.clone());
        for (name, grad) in gradients {
            *squares.entry(own(name)).or_default() += squared_norm(grad)?;
        }
        if squares.values().any(|square| !square.is_finite()) {
            return Err(Error::request(
                format!("the gradients are not finite at step {}", self.steps + 1),
                "lower the learning rate, or look for infinite values in the data",
            ));
        }
        let max_norm = self.config.max_norm;
        let clip = |square: &f64| (max_norm / (square.sqrt() + 1e-6)).min(1.0);
        let clips: BTreeMap<String, f64> =
            self.vars.keys().map(|name| (name.clone(), squares.get(&own(name)).map_or(1.0, clip))).collect();
        let info = StepInfo { norm: squares[&None].sqrt(), clip: clip(&squares[&None]) };
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        self.steps += 1;
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let (c1, c2) = (correction(beta1), correction(beta2));
        for (name, var) in &self.vars {
            let (lr, weight_decay) = match self.groups.iter().find(|group| name.starts_with(&group.prefix)) {
                Some(group) => (lr * group.learning_rate, weight_decay * group.weight_decay),
                None => (lr, weight_decay),
            };
            let Some((m, v)) = self.moments.get_mut(name) else { continue };
            let update = Update {
                beta1,
                beta2,
                eps,
                clip: clips[name],
                correction2: c2,
                rate: lr / c1,
                keep: 1.0 - lr * weight_decay,
            };
            let old = var.as_detached_tensor();
            let (new, first, second) = update.apply(&old, (m, v), gradients.get(name))?;
            (*m, *v) = (first, second);
            var.set(&new)?;
        }
        Ok(info)
    }

    /// Lets `change` rewrite tensors and moments in place, one after the other in the order of names, and counts
    /// `steps` steps as taken. For ranks that take over another's state.
    pub fn overwrite(&mut self, steps: u64, mut change: impl FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
        let mut changed = |tensor: &Tensor| -> Result<Tensor> {
            let mut values = tensor.flatten_all()?.to_vec1::<f32>()?;
            change(&mut values)?;
            Ok(Tensor::from_vec(values, tensor.shape(), tensor.device())?)
        };
        for (name, var) in &self.vars {
            var.set(&changed(&var.as_detached_tensor())?)?;
            if let Some((m, v)) = self.moments.get_mut(name) {
                (*m, *v) = (changed(m)?, changed(v)?);
            }
        }
        self.steps = steps;
        Ok(())
    }

    /// The moments as `exp_avg.<name>` and `exp_avg_sq.<name>`, for a checkpoint.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let pairs = self.moments.iter();
        pairs
            .flat_map(|(name, (m, v))| {
                [(format!("exp_avg.{name}"), m.clone()), (format!("exp_avg_sq.{name}"), v.clone())]
            })
            .collect()
    }

    /// Continues from the moments of [`AdamW::state`] after `steps` steps. The trained tensors themselves are
    /// the caller's to restore.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>, steps: u64) -> Result<()> {
        let find = |key: String, like: &Tensor| match state.get(&key) {
            Some(t) if t.dims() == like.dims() => Ok(t.to_dtype(DType::F32)?.to_device(like.device())?),
            Some(t) => Err(Error::request(
                format!("optimiser state `{key}` has shape {:?}, expected {:?}", t.dims(), like.dims()),
                "resume with the configuration the checkpoint was written with",
            )),
            None => Err(Error::request(
                format!("optimiser state `{key}` is missing"),
                "resume with the configuration the checkpoint was written with",
            )),
        };
        let mut moments = BTreeMap::new();
        for (name, (m, v)) in &self.moments {
            let pair = (find(format!("exp_avg.{name}"), m)?, find(format!("exp_avg_sq.{name}"), v)?);
            moments.insert(name.clone(), pair);
        }
        (self.moments, self.steps) = (moments, steps);
        Ok(())
    }
}

/// Linear warm-up from 1e-5 of the base rate, then a cosine to zero, per iteration.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Schedule {
    /// The highest learning rate.
    pub base: f64,
    /// Iterations of warm-up; the last of them runs at the base rate.
    pub warmup: u64,
    /// All iterations, warm-up included.
    pub total: u64,
}

impl Schedule {
    /// The paper's schedule: the warm-up is `ratio` of `epochs`, truncated to whole iterations.
    pub fn epochs(base: f64, iterations_per_epoch: u64, epochs: u64, ratio: f64) -> Self {
        let warmup = (ratio * epochs as f64 * iterations_per_epoch as f64) as u64;
        Self { base, warmup, total: epochs.saturating_mul(iterations_per_epoch) }
    }

    /// The learning rate used by iteration `k`, counted from 0.
    pub fn lr(&self, k: u64) -> f64 {
        const START: f64 = 1e-5;
        if k < self.warmup {
            if self.warmup == 1 {
                return self.base;
            }
            return self.base * (START + (1.0 - START) * k as f64 / (self.warmup - 1) as f64);
        }
        // In the spec's order of operations: near the end 1 + cos amplifies every rounding.
        let (done, length) = (k - self.warmup, self.total.saturating_sub(self.warmup).max(1));
        let angle = std::f64::consts::PI * done.min(length) as f64 / length as f64;
        self.base * 0.5 * (1.0 + angle.cos())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn one_var(value: f32) -> Vars {
        BTreeMap::from([("p".to_owned(), Var::new(&[value], &Device::Cpu).unwrap())])
    }

    fn grad(value: f32) -> Gradients {
        BTreeMap::from([("p".to_owned(), Tensor::new(&[value], &Device::Cpu).unwrap())])
    }

    #[test]
    fn refuses_what_it_cannot_use_and_changes_nothing() {
        let mut adam = AdamW::new(one_var(1.0), AdamWConfig::default()).unwrap();
        assert!(adam.step(&grad(f32::NAN), 0.1).is_err());
        let stranger = BTreeMap::from([("q".to_owned(), Tensor::new(&[1f32], &Device::Cpu).unwrap())]);
        assert!(adam.step(&stranger, 0.1).unwrap_err().to_string().contains("`q`"));
        assert_eq!(adam.steps(), 0);
        assert_eq!(adam.vars()["p"].to_vec1::<f32>().unwrap(), [1.0]);
    }

    #[test]
    fn state_round_trip_continues_exactly() {
        let mut one = AdamW::new(one_var(1.0), AdamWConfig::default()).unwrap();
        for k in 0..5 {
            one.step(&grad(0.3 * k as f32 - 0.5), 0.01).unwrap();
        }
        let p = one.vars()["p"].to_vec1::<f32>().unwrap()[0];
        let mut two = AdamW::new(one_var(p), AdamWConfig::default()).unwrap();
        two.restore(&one.state(), one.steps()).unwrap();
        for adam in [&mut one, &mut two] {
            adam.step(&grad(0.7), 0.01).unwrap();
        }
        assert_eq!(one.vars()["p"].to_vec1::<f32>().unwrap(), two.vars()["p"].to_vec1::<f32>().unwrap());
        assert!(two.restore(&BTreeMap::new(), 1).is_err());
    }

    #[test]
    fn the_longest_schedule_does_not_wrap_around() {
        assert_eq!(Schedule::epochs(1.0, 3, u64::MAX / 2, 0.03).total, u64::MAX);
    }

    #[test]
    fn groups_learn_at_their_own_rate_and_are_clipped_alone() {
        let vars = || {
            let var = || Var::new(&[1f32], &Device::Cpu).unwrap();
            Vars::from([("a.w".to_owned(), var()), ("b.w".to_owned(), var()), ("c.w".to_owned(), var())])
        };
        let grad = |value: f32| Tensor::new(&[value], &Device::Cpu).unwrap();
        let group = |prefix: &str, learning_rate, weight_decay, own_norm| ParamGroup {
            prefix: prefix.into(),
            learning_rate,
            weight_decay,
            own_norm,
        };
        let value = |adam: &AdamW, name: &str| adam.vars()[name].to_vec1::<f32>().unwrap()[0];
        // A huge gradient in a group with a norm of its own changes nothing about the others.
        let run = |with_b: bool| {
            let groups = vec![group("b.", 1.0, 1.0, true), group("c.", 0.5, 0.0, false)];
            let mut adam = AdamW::new(vars(), AdamWConfig::default()).unwrap().with_groups(groups).unwrap();
            let mut info = None;
            for k in 0..4 {
                let mut grads =
                    Gradients::from([("a.w".into(), grad(2.0 + k as f32)), ("c.w".into(), grad(1.0))]);
                if with_b {
                    grads.insert("b.w".into(), grad(1e6));
                }
                info = Some(adam.step(&grads, 0.1).unwrap());
            }
            (adam, info.unwrap())
        };
        let ((one, info), (other, same)) = (run(true), run(false));
        assert_eq!((value(&one, "a.w"), value(&one, "c.w")), (value(&other, "a.w"), value(&other, "c.w")));
        assert_eq!(info, same);
        assert!(value(&one, "b.w") < value(&other, "b.w"));
        // Half the rate and no decay: four steps of Adam of at most lr / 2 each.
        assert!((value(&one, "c.w") - (1.0 - 4.0 * 0.05)).abs() < 0.02, "{}", value(&one, "c.w"));
        let unknown = AdamW::new(vars(), AdamWConfig::default()).unwrap();
        let error = unknown.with_groups(vec![group("d.", 1.0, 1.0, false)]).err().unwrap();
        assert!(error.to_string().contains("`d.`"), "{error}");
    }

    #[test]
    fn accumulates_with_weights() {
        let mut total = Gradients::new();
        accumulate(&mut total, &grad(2.0), 0.5).unwrap();
        accumulate(&mut total, &grad(4.0), 0.25).unwrap();
        assert_eq!(total["p"].to_vec1::<f32>().unwrap(), [2.0]);
    }

    #[test]
    fn short_schedules_are_finite() {
        for total in 1..5 {
            for warmup in 0..=total {
                let schedule = Schedule { base: 1.0, warmup, total };
                assert!((0..total + 2).all(|k| (0.0..=1.0).contains(&schedule.lr(k))));
            }
        }
    }
}
