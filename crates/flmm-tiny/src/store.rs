//! The trainable tensors of one stage: initialisation and the optimiser, with an exact checkpoint of both.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, Var};
use flmm::weights::Params;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Draws initial tensors.
pub(crate) struct Init<'a> {
    rng: &'a mut ChaCha8Rng,
    tensors: BTreeMap<String, Tensor>,
}

impl<'a> Init<'a> {
    /// Nothing drawn yet.
    pub(crate) fn new(rng: &'a mut ChaCha8Rng) -> Self {
        Self { rng, tensors: BTreeMap::new() }
    }

    /// Normal values of standard deviation `std`.
    pub(crate) fn normal(&mut self, name: impl Into<String>, shape: &[usize], std: f32) -> Result<()> {
        let count: usize = shape.iter().product();
        let mut data = Vec::with_capacity(count + 1);
        while data.len() < count {
            let (a, b) = gaussian_pair(self.rng);
            data.push(a * std);
            data.push(b * std);
        }
        data.truncate(count);
        self.insert(name, Tensor::from_vec(data, shape, &Device::Cpu)?);
        Ok(())
    }

    /// One value everywhere.
    pub(crate) fn constant(&mut self, name: impl Into<String>, shape: &[usize], value: f32) -> Result<()> {
        self.insert(name, Tensor::full(value, shape, &Device::Cpu)?);
        Ok(())
    }

    /// A given tensor.
    pub(crate) fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// What was drawn.
    pub(crate) fn finish(self) -> BTreeMap<String, Tensor> {
        self.tensors
    }
}

/// Two independent standard normal values (Box-Muller).
pub(crate) fn gaussian_pair(rng: &mut ChaCha8Rng) -> (f32, f32) {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    let angle = std::f64::consts::TAU * rng.random::<f64>();
    ((radius * angle.cos()) as f32, (radius * angle.sin()) as f32)
}

/// Gradients by tensor name.
pub(crate) type Grads = BTreeMap<String, Tensor>;

/// Named variables with their AdamW moments.
pub(crate) struct Store {
    vars: BTreeMap<String, Var>,
    moments: BTreeMap<String, [Vec<f32>; 2]>,
    /// Optimiser steps taken.
    pub(crate) step: usize,
}

/// AdamW's constants.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamW {
    /// Decay rates of the two moments.
    pub(crate) betas: (f64, f64),
    /// Decoupled weight decay.
    pub(crate) weight_decay: f64,
    /// Gradients are scaled down to this global norm.
    pub(crate) max_norm: f64,
}

impl Store {
    /// Variables that start at `tensors`.
    pub(crate) fn new(tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let mut vars = BTreeMap::new();
        for (name, tensor) in tensors {
            vars.insert(name, Var::from_tensor(&tensor)?);
        }
        Ok(Self { vars, moments: BTreeMap::new(), step: 0 })
    }

    /// The variables as parameters of a module; gradients flow into them.
    pub(crate) fn params(&self, frozen: &HashMap<String, Tensor>) -> Params {
        let mut all = frozen.clone();
        all.extend(self.vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())));
        Params::new("variables", all)
    }

    /// Current values.
    pub(crate) fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
    }

    /// The gradient of `loss` for every variable it depends on.
    pub(crate) fn gradients(&self, loss: &Tensor) -> Result<Grads> {
        let mut store = loss.backward()?;
        let grads =
            self.vars.iter().filter_map(|(name, var)| Some((name.clone(), store.remove(var.as_tensor())?)));
        Ok(grads.collect())
    }

    /// One AdamW step on the mean of the workers' gradients; `rate` gives each tensor its learning rate.
    ///
    /// Returns the gradient norm before clipping. A gradient that is not finite changes nothing.
    pub(crate) fn update(
        &mut self,
        workers: &[Grads],
        adam: &AdamW,
        rate: impl Fn(&str) -> f64,
    ) -> Result<f64> {
        let mut sums: BTreeMap<&String, Vec<f32>> = BTreeMap::new();
        for grads in workers {
            for (name, grad) in grads {
                let grad = grad.flatten_all()?.to_vec1::<f32>()?;
                match sums.get_mut(name) {
                    Some(sum) => sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g),
                    None => drop(sums.insert(name, grad)),
                }
            }
        }
        let share = 1.0 / workers.len() as f64;
        let square: f64 = sums.values().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum();
        let norm = square.sqrt() * share;
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.step += 1;
        let scale = (share * (adam.max_norm / (norm + 1e-6)).min(1.0)) as f32;
        let (b1, b2) = (adam.betas.0 as f32, adam.betas.1 as f32);
        let correct1 = 1.0 - adam.betas.0.powi(self.step as i32);
        let correct2 = (1.0 - adam.betas.1.powi(self.step as i32)).sqrt();
        for (name, grad) in sums {
            let (Some(var), lr) = (self.vars.get(name), rate(name)) else { continue };
            let mut data = var.flatten_all()?.to_vec1::<f32>()?;
            let moments = self.moments.entry(name.clone());
            let [m, v] = moments.or_insert_with(|| [vec![0.0; data.len()], vec![0.0; data.len()]]);
            // Norms, biases and other vectors are not decayed.
            let keep = if var.rank() > 1 { (1.0 - lr * adam.weight_decay) as f32 } else { 1.0 };
            let (rate, correct2) = ((lr / correct1) as f32, correct2 as f32);
            for i in 0..data.len() {
                let g = grad[i] * scale;
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                data[i] = data[i] * keep - rate * m[i] / (v[i].sqrt() / correct2 + 1e-8);
            }
            var.set(&Tensor::from_vec(data, var.shape(), &Device::Cpu)?)?;
        }
        Ok(norm)
    }

    /// Writes variables, moments and the step to one file, atomically.
    pub(crate) fn save(&self, file: &Path) -> Result<()> {
        let mut tensors = HashMap::new();
        for (name, var) in &self.vars {
            tensors.insert(format!("var.{name}"), var.as_detached_tensor());
        }
        for (name, [m, v]) in &self.moments {
            tensors.insert(format!("m.{name}"), Tensor::new(m.as_slice(), &Device::Cpu)?);
            tensors.insert(format!("v.{name}"), Tensor::new(v.as_slice(), &Device::Cpu)?);
        }
        tensors.insert("step".into(), Tensor::new(&[self.step as u32], &Device::Cpu)?);
        let temporary = file.with_extension("partial");
        candle_core::safetensors::save(&tensors, &temporary)?;
        std::fs::rename(&temporary, file).with_context(|| format!("cannot write {}", file.display()))
    }

    /// Restores what [`Store::save`] wrote; the names and shapes must be the store's own.
    pub(crate) fn restore(&mut self, file: &Path) -> Result<()> {
        let tensors = candle_core::safetensors::load(file, &Device::Cpu)
            .with_context(|| format!("cannot read {}", file.display()))?;
        for (name, var) in &self.vars {
            let saved = tensors.get(&format!("var.{name}"));
            let saved = saved.with_context(|| format!("{} lacks tensor `{name}`", file.display()))?;
            ensure!(saved.dims() == var.dims(), "{}: `{name}` has another shape", file.display());
            var.set(saved)?;
        }
        self.moments.clear();
        for name in self.vars.keys() {
            if let (Some(m), Some(v)) = (tensors.get(&format!("m.{name}")), tensors.get(&format!("v.{name}")))
            {
                self.moments.insert(name.clone(), [m.to_vec1()?, v.to_vec1()?]);
            }
        }
        let step = tensors.get("step").with_context(|| format!("{} lacks `step`", file.display()))?;
        self.step = step.to_vec1::<u32>()?.first().copied().unwrap_or(0) as usize;
        Ok(())
    }
}
