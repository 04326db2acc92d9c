//! The small SAM can be trained: gradients exist, are right, and batching changes nothing.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use flmm::sam::{ImageEncoder, PromptOptions, Refiner, Sam, SamConfig, SamGeometry};
use flmm::weights::Params;
use flmm::{Error, Result};

/// 4×4 tokens, windows of 3 (so that they are padded), one global block.
fn config() -> SamConfig {
    let config = SamConfig {
        image_size: 32,
        patch_size: 8,
        window_size: 3,
        mlp_ratio: 2.0,
        decoder_num_heads: 2,
        decoder_depth: 2,
        mask_in_chans: 16,
        embed_dim: 8,
        depth: 2,
        num_heads: 2,
        global_attn_indexes: vec![1],
        prompt_embed_dim: 16,
        mlp_dim: 12,
        attention_downsample_rate: 2,
        iou_head_hidden_dim: None,
    };
    assert_eq!(config.validate(), Ok(()));
    config
}

/// Values in −1..1 without structure.
fn noise(shape: &[usize], seed: u64) -> Result<Tensor> {
    let draw = |i: u64| {
        let mut x = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ seed.wrapping_mul(0xD134_2543_DE82_EF95);
        x = (x ^ (x >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (x >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let values = (0..shape.iter().product::<usize>() as u64).map(draw).collect::<Vec<_>>();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Fresh tensors; those that start as zeros or ones are disturbed so that they matter.
fn tensors() -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = Sam::init(&config(), 7)?;
    for (i, (name, tensor)) in tensors.iter_mut().enumerate() {
        if name.contains("norm") || name.contains("pos") || name.contains(".1.") || name.contains("neck.3") {
            *tensor = (&*tensor + (noise(tensor.dims(), i as u64)? * 0.3)?)?;
        }
    }
    Ok(tensors)
}

fn load(tensors: &BTreeMap<String, Tensor>) -> Result<Sam> {
    let tensors: HashMap<String, Tensor> = tensors.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let params = Params::new("fresh tensors", tensors);
    let sam = Sam::load(&config(), &params)?;
    params.finish("")?;
    assert_eq!(params.unused(), Vec::<String>::new());
    Ok(sam)
}

/// A picture that is not square, three phrases of 2, 1 and 2 tokens.
struct Inputs {
    pixels: Tensor,
    cnn_logits: Tensor,
    texts: Vec<Tensor>,
    geometry: SamGeometry,
}

fn inputs() -> Result<Inputs> {
    Ok(Inputs {
        pixels: noise(&[1, 3, 32, 32], 1)?,
        cnn_logits: noise(&[3, 4, 6], 2)?,
        texts: vec![noise(&[2, 16], 3)?, noise(&[1, 16], 4)?, noise(&[2, 16], 5)?],
        geometry: SamGeometry::new((14, 21), 32),
    })
}

fn loss(tensors: &BTreeMap<String, Tensor>, options: &PromptOptions) -> Result<Tensor> {
    let (sam, x) = (load(tensors)?, inputs()?);
    let embedding = sam.image_encoder().forward(&x.pixels)?;
    let logits = sam.refiner().refine(&embedding, &x.cnn_logits, &x.texts, &x.geometry, options)?;
    assert_eq!(logits.dims(), [3, 14, 21]);
    score(&logits)
}

/// A loss that looks at every pixel, summed in f64 so that small differences of it are exact.
fn score(logits: &Tensor) -> Result<Tensor> {
    Ok((logits * noise(&[3, 14, 21], 6)?)?.to_dtype(DType::F64)?.sum_all()?)
}

fn norm(x: &Tensor) -> Result<f32> {
    Ok(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt())
}

fn variants() -> [PromptOptions; 5] {
    let all = PromptOptions::default();
    [
        all,
        PromptOptions { mask_prompt: false, ..all },
        PromptOptions { box_prompt: false, ..all },
        PromptOptions { text_prompt: false, ..all },
        PromptOptions { multimask: true, ..all },
    ]
}

#[test]
fn every_trained_tensor_gets_a_gradient_and_no_other() -> Result<()> {
    for options in variants() {
        let vars: BTreeMap<String, Var> =
            tensors()?.iter().map(|(k, v)| Ok((k.clone(), Var::from_tensor(v)?))).collect::<Result<_>>()?;
        let tracked = vars.iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
        let grads = loss(&tracked, &options)?.backward()?;
        for (name, var) in &vars {
            let size = grads.get(var).map(norm).transpose()?.unwrap_or(0.0);
            let trained = name.starts_with("image_encoder.") || Refiner::is_trained(name, &options);
            assert!(size.is_finite(), "{name}: gradient of norm {size}");
            // Softmax does not see what all its inputs share: only rounding noise reaches these.
            if name.ends_with("k_proj.bias") {
                assert!(size < 1e-4, "{name}: gradient of norm {size}");
            } else if trained {
                // Which alternatives are chosen decides which of their hyper-networks learn.
                let chance = options.multimask && name.contains("hypernetworks");
                assert!(size > 1e-5 || chance, "{name}: gradient of norm {size} with {options:?}");
            } else {
                assert_eq!(size, 0.0, "{name} gets a gradient with {options:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_equal_finite_differences() -> Result<()> {
    let options = PromptOptions::default();
    let tensors = tensors()?;
    let vars: BTreeMap<String, Var> =
        tensors.iter().map(|(k, v)| Ok((k.clone(), Var::from_tensor(v)?))).collect::<Result<_>>()?;
    let tracked = vars.iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
    let grads = loss(&tracked, &options)?.backward()?;
    let mut checked = 0;
    for (name, var) in &vars {
        let Some(grad) = grads.get(var) else { continue };
        let size = norm(grad)?;
        if name.ends_with("k_proj.bias") || size < 0.02 {
            continue;
        }
        let step = 1e-3;
        let along = |sign: f64| {
            let mut moved = tensors.clone();
            let shift = (grad * (sign * step / f64::from(size)))?;
            moved.insert(name.clone(), (&tensors[name] + shift)?);
            Ok::<_, Error>(loss(&moved, &options)?.to_scalar::<f64>()?)
        };
        let slope = (along(1.0)? - along(-1.0)?) / (2.0 * step);
        let error = (slope - f64::from(size)).abs() / f64::from(size);
        assert!(error < 0.03, "{name}: slope {slope}, gradient {size}");
        checked += 1;
    }
    assert!(
        checked > vars.len() / 2,
        "only {checked} of {} gradients were large enough to check",
        vars.len()
    );
    Ok(())
}

#[test]
fn the_mask_prompt_carries_gradient_to_the_cnn_logits_and_the_text_prompt_to_the_words() -> Result<()> {
    let (sam, x) = (load(&tensors()?)?, inputs()?);
    let embedding = sam.image_encoder().forward(&x.pixels)?;
    let cnn = Var::from_tensor(&x.cnn_logits)?;
    let texts = x.texts.iter().map(|t| Ok(Var::from_tensor(t)?)).collect::<Result<Vec<_>>>()?;
    let tracked: Vec<Tensor> = texts.iter().map(|t| t.as_tensor().clone()).collect();
    let run = |cnn: &Tensor, texts: &[Tensor], options: PromptOptions| {
        let logits = sam.refiner().refine(&embedding, cnn, texts, &x.geometry, &options)?;
        score(&logits)
    };
    let all = PromptOptions::default();
    let grads = run(cnn.as_tensor(), &tracked, all)?.backward()?;
    for text in &texts {
        assert!(grads.get(text).map(norm).transpose()?.unwrap_or(0.0) > 1e-6);
    }
    // The box and the padding value are constants.
    let grads = run(cnn.as_tensor(), &tracked, PromptOptions { mask_prompt: false, ..all })?.backward()?;
    assert!(grads.get(&cnn).is_none());

    // Without the box, which jumps, the loss follows the gradient.
    let no_box = PromptOptions { box_prompt: false, ..all };
    let grads = run(cnn.as_tensor(), &tracked, no_box)?.backward()?;
    let grad = grads.get(&cnn).ok_or_else(|| Error::request("no gradient", ""))?;
    let (size, step) = (f64::from(norm(grad)?), 1e-3);
    let along = |sign: f64| {
        let moved = (&x.cnn_logits + (grad * (sign * step / size))?)?;
        Ok::<_, Error>(run(&moved, &x.texts, no_box)?.to_scalar::<f64>()?)
    };
    let slope = (along(1.0)? - along(-1.0)?) / (2.0 * step);
    assert!((slope - size).abs() < 0.03 * size, "slope {slope}, gradient {size}");
    Ok(())
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?)
}

#[test]
fn a_batch_equals_its_members() -> Result<()> {
    let (sam, x) = (load(&tensors()?)?, inputs()?);
    let pictures = noise(&[3, 3, 32, 32], 8)?;
    let embeddings = sam.image_encoder().forward(&pictures)?;
    for options in variants() {
        // All logits are above −1, so the shared padding value is −1 whoever is in the batch.
        let batch = sam.refiner().refine(&embeddings, &x.cnn_logits, &x.texts, &x.geometry, &options)?;
        for i in 0..3 {
            let embedding = sam.image_encoder().forward(&pictures.narrow(0, i, 1)?)?;
            let (logits, text) = (x.cnn_logits.narrow(0, i, 1)?, &x.texts[i..=i]);
            let alone = sam.refiner().refine(&embedding, &logits, text, &x.geometry, &options)?;
            let difference = largest_difference(&batch.narrow(0, i, 1)?, &alone)?;
            assert!(difference < 1e-5, "phrase {i} with {options:?}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn initial_tensors_follow_the_seed_and_the_default_distributions() -> Result<()> {
    let (a, b, c) = (Sam::init(&config(), 1)?, Sam::init(&config(), 1)?, Sam::init(&config(), 2)?);
    let name = "mask_decoder.transformer.layers.0.mlp.lin2.weight";
    assert_eq!(largest_difference(&a[name], &b[name])?, 0.0);
    assert!(largest_difference(&a[name], &c[name])? > 0.01);
    let big = Sam::init(&SamConfig { prompt_embed_dim: 256, decoder_num_heads: 8, ..config() }, 3)?;
    let gaussian = &big["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"];
    let std = norm(gaussian)? / (gaussian.elem_count() as f32).sqrt();
    assert!((0.85..1.15).contains(&std), "standard normal expected, found {std}");
    let bound = largest_difference(&big[name], &big[name].zeros_like()?)?;
    let expected = 1.0 / 12f32.sqrt();
    assert!((0.9 * expected..=expected).contains(&bound), "uniform in ±{expected} expected, found {bound}");
    Ok(())
}

#[test]
fn unfit_inputs_are_told_apart() -> Result<()> {
    let (sam, x) = (load(&tensors()?)?, inputs()?);
    let embedding = sam.image_encoder().forward(&x.pixels)?;
    let options = PromptOptions::default();
    let refine = |embedding: &Tensor, logits: &Tensor, texts: &[Tensor]| match sam.refiner().refine(
        embedding,
        logits,
        texts,
        &x.geometry,
        &options,
    ) {
        Ok(_) => String::from("accepted"),
        Err(error) => error.to_string(),
    };
    let empty = [x.texts[0].clone(), x.texts[1].narrow(0, 0, 0)?, x.texts[2].clone()];
    assert!(refine(&embedding, &x.cnn_logits, &empty).contains("phrase 1 has text tokens of shape [0, 16]"));
    assert!(refine(&embedding, &x.cnn_logits, &x.texts[..2]).contains("expected [2, mh, mw]"));
    assert!(refine(&x.pixels, &x.cnn_logits, &x.texts).contains("image embedding has shape"));
    assert!(sam.image_encoder().forward(&noise(&[1, 3, 32, 16], 1)?).is_err());
    assert_eq!(
        sam.refiner().refine(&embedding, &x.cnn_logits.narrow(0, 0, 0)?, &[], &x.geometry, &options)?.dims(),
        [0, 14, 21]
    );
    Ok(())
}

#[test]
fn impossible_configurations_are_refused() {
    let wrong = [
        (SamConfig { patch_size: 5, ..config() }, "image_size"),
        (SamConfig { num_heads: 3, ..config() }, "embed_dim"),
        (SamConfig { global_attn_indexes: vec![2], ..config() }, "global_attn_indexes"),
        (SamConfig { depth: 0, ..config() }, "depth"),
        (SamConfig { mlp_ratio: f64::NAN, ..config() }, "mlp_ratio"),
        (SamConfig { image_size: usize::MAX, ..config() }, "image_size"),
    ];
    for (config, key) in wrong {
        assert!(config.validate().is_err_and(|what| what.contains(key)), "{key}");
    }
    assert_eq!(SamConfig::by_name("sam_vit_l_0b3195.pth"), Some(SamConfig::vit_l()));
    assert_eq!(SamConfig::by_name("facebook/SAM-ViT-B"), Some(SamConfig::vit_b()));
    assert_eq!(SamConfig::by_name("mobile_sam"), None);
    for config in [SamConfig::vit_b(), SamConfig::vit_l(), SamConfig::vit_h()] {
        assert_eq!(config.validate(), Ok(()));
    }
}

#[test]
fn sizes_are_told_by_the_tensors() -> Result<()> {
    // The head count of the decoder is in no shape: the public 8 is assumed.
    let config =
        SamConfig { decoder_num_heads: 8, prompt_embed_dim: 32, iou_head_hidden_dim: Some(20), ..config() };
    let params = Params::new("file.pth", Sam::init(&config, 1)?.into_iter().collect());
    assert_eq!(SamConfig::from_tensors(&params, "file.pth".as_ref())?, config);
    let empty = Params::new("file.pth", HashMap::new());
    let error = SamConfig::from_tensors(&empty, "file.pth".as_ref());
    assert!(error.is_err_and(|e| e.to_string().contains("image_encoder.patch_embed.proj.weight")));
    let _ = ImageEncoder::load(&config, &params.pp("image_encoder"))?;
    Ok(())
}
