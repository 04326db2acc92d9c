//! Every LMM family with goldens, from picture and text to masks, in f32 and bf16 (`goldens/lmm/README.md`).

mod common;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::{Golden, TestResult, golden_dir, json, max_abs_diff, rel_l2};
use flmm::Grounder;
use flmm::capture::{Capture, weighted_hidden};
use flmm::grounder::{AnswerOptions, Caption, ModelPaths, Observation};
use flmm::image_input::read_image;
use flmm::layout::Merge;
use flmm::lmm::{
    self, GROUNDING_INSTRUCTION, ImageInput, Lmm, OpenOptions, Prepared, REGISTRY, Turn, recognise,
};
use flmm::nn::bilinear;
use flmm::sam::PromptOptions;
use flmm::text::chat::MODELS;
use flmm::text::sampling::Sampler;
use flmm::text::{KvCache, Limits, generate};
use flmm::vision::anyres::unpad;
use image::RgbImage;
use serde_json::Value;

/// A recorded run: one picture and text of one family in one arithmetic.
struct Case {
    golden: Golden,
    record: Value,
    /// Relative change of every tensor under another legitimate bf16 arithmetic; `None` for f32.
    noise: Option<Value>,
    picture: PathBuf,
}

impl Case {
    /// Compares with the absolute tolerance in f32, with the relative one (or twice the noise) in bf16.
    fn check(&mut self, name: &str, actual: &Tensor, absolute: f64, relative: f64) -> TestResult {
        let Some(noise) = &self.noise else { return self.golden.check(name, actual, absolute) };
        if !self.golden.has(name) {
            return Ok(());
        }
        let noise = noise["rel_l2"][name].as_f64().unwrap_or(0.0);
        let tolerance = relative.max(2.0 * noise);
        let difference = rel_l2(actual, self.golden.get(name)?)
            .map_err(|e| format!("{}: {name}: {e}", self.golden.case))?;
        println!("{}: {name}: {difference:.4} relative (tolerance {tolerance:.3})", self.golden.case);
        match difference <= tolerance {
            true => Ok(()),
            false => Err(format!(
                "{}: first diverging tensor `{name}`: {difference} > {tolerance}",
                self.golden.case
            )
            .into()),
        }
    }

    fn exact<T: PartialEq + std::fmt::Debug>(&self, name: &str, actual: T, expected: T) -> TestResult {
        match actual == expected {
            true => Ok(()),
            false => Err(format!("{}: {name}: {actual:?}, expected {expected:?}", self.golden.case).into()),
        }
    }

    /// Recorded token ids with one image token: the sentinel -200 is replaced by the model's, a run of them
    /// (recorded run by run) by one.
    fn ids(&self, name: &str, prepared: &Prepared) -> TestResult<Vec<u32>> {
        let image = prepared.token_ids[prepared.image.layout.start];
        let ids: Vec<i64> = match self.record.get(format!("{name}_rle")) {
            Some(_) => unexpanded(&self.runs(name)?, prepared),
            None => self.list(name)?,
        };
        Ok(ids.into_iter().map(|id| u32::try_from(id).unwrap_or(image)).collect())
    }

    /// A list that was recorded as pairs of a value and how often it comes.
    fn runs(&self, name: &str) -> TestResult<Vec<i64>> {
        let runs: Vec<(i64, usize)> = self.list(&format!("{name}_rle"))?;
        Ok(runs.into_iter().flat_map(|(value, count)| std::iter::repeat_n(value, count)).collect())
    }

    fn list<T: serde::de::DeserializeOwned>(&self, name: &str) -> TestResult<T> {
        serde_json::from_value(self.record[name].clone())
            .map_err(|e| format!("{}: {name}: {e}", self.golden.case).into())
    }
}

/// Recorded `projector_out [views, tokens, hidden]` of a picture in crops, in the order the decoder reads it; the
/// same numbers of what `project` gave. Newlines, which are not recorded, are left out.
fn in_reading_order(
    recorded: &Tensor,
    projected: &Tensor,
    image: &ImageInput,
) -> TestResult<(Tensor, Tensor)> {
    let (_, tokens, _) = recorded.dims3()?;
    let side = tokens.isqrt();
    let (geometry, pixels) = (&image.geometry, image.pixel_values.dim(3)?);
    let (down, across) = (geometry.padded_shape.0 / pixels, geometry.padded_shape.1 / pixels);
    let (top, left, rows, columns) = unpad(geometry.original, (side * down, side * across));
    let (mut ours, mut theirs): (Vec<u32>, Vec<u32>) =
        ((0..tokens as u32).collect(), (0..tokens as u32).collect());
    for (y, x) in (0..rows).flat_map(|y| (0..columns).map(move |x| (y, x))) {
        ours.push((tokens + y * (columns + 1) + x) as u32);
        let (y, x) = (top + y, left + x);
        let view = 1 + y / side * across + x / side;
        theirs.push((view * tokens + y % side * side + x % side) as u32);
    }
    let pick = |from: &Tensor, index: Vec<u32>| from.index_select(&Tensor::new(index, &Device::Cpu)?, 0);
    Ok((pick(&recorded.flatten_to(1)?, theirs)?, pick(projected, ours)?))
}

/// Folders of models this build can open, with the names of the models.
fn families() -> TestResult<Vec<(&'static str, PathBuf)>> {
    let Some(root) = golden_dir("lmm") else { return Ok(Vec::new()) };
    let mut families = Vec::new();
    for entry in std::fs::read_dir(&root)? {
        let dir = entry?.path();
        if !dir.join("model").is_dir() || !dir.join("expected").is_dir() {
            continue;
        }
        if let Ok(entry) = recognise(&dir.join("model")) {
            families.push((entry.spec.name, dir));
        }
    }
    families.sort();
    Ok(families)
}

/// What the files of a case do not tell: towers that lie beside the model, the size of the picture.
fn options(dir: &Path, dtype: DType) -> TestResult<OpenOptions> {
    let mut options = OpenOptions::new(dtype, &Device::Cpu);
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("openai-clip") {
            options.vision_tower = Some(path);
        } else if name.starts_with("openclip") {
            options.vision_tower_aux = Some(path);
        }
    }
    let geometry = &json(&dir.join("expected/a.f32.json"))?["geometry"];
    options.image_size = geometry["padded_shape"]["height"].as_u64().map(|side| side as usize);
    Ok(options)
}

/// Cases `expected/<picture>.<dtype>.safetensors` of a family.
fn cases(dir: &Path, suffix: &str) -> TestResult<Vec<Case>> {
    let noise = json(&dir.join("expected/noise.json"))?;
    let family = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(dir.join("expected"))? {
        let file = entry?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(picture) = name.strip_suffix(&format!(".{suffix}.safetensors")) else { continue };
        let mut golden = Golden::open(&file)?;
        golden.case = format!("{family}/{picture}.{suffix}");
        let noise = (suffix == "bf16").then(|| noise[picture]["bf16_other_arithmetic"].clone());
        let record = json(&file.with_extension("json"))?;
        cases.push(Case {
            golden,
            record,
            noise,
            picture: dir.join("images").join(format!("{picture}.png")),
        });
    }
    cases.sort_by(|a, b| a.golden.case.cmp(&b.golden.case));
    assert!(!cases.is_empty(), "{} has no {suffix} cases", dir.display());
    Ok(cases)
}

/// A family's model, with the recorded heads unless they were left out to keep a folder small.
enum Opened {
    Whole(Box<Grounder>),
    Lmm(Box<dyn Lmm>),
}

impl Opened {
    fn lmm(&self) -> &dyn Lmm {
        match self {
            Self::Whole(grounder) => grounder.lmm(),
            Self::Lmm(lmm) => lmm.as_ref(),
        }
    }
}

fn open(dir: &Path, dtype: DType) -> TestResult<Opened> {
    let head =
        ["heads.safetensors", "heads.pth"].map(|name| dir.join(name)).into_iter().find(|file| file.is_file());
    let (model, options) = (dir.join("model"), options(dir, dtype)?);
    let Some(head) = head else { return Ok(Opened::Lmm(lmm::open_with(&model, &options)?)) };
    let sam = golden_dir("lmm/_sam").ok_or("lmm/_sam is missing")?;
    let sam = ["sam_vit_tiny.safetensors", "sam_vit_tiny.pth"]
        .map(|name| sam.join(name))
        .into_iter()
        .find(|file| file.is_file());
    let paths = ModelPaths { model, sam: sam.ok_or("no SAM file")?, head };
    Ok(Opened::Whole(Box::new(Grounder::open_with(&paths, &options)?)))
}

/// The recorded text, segment by segment.
fn caption(lmm: &dyn Lmm, text: &Value) -> TestResult<Caption> {
    if text["kind"] == "expressions" {
        let phrases: Vec<String> = serde_json::from_value(text["phrases"].clone())?;
        return Ok(Caption::from_expressions(lmm.tokenizer(), phrases.iter().map(String::as_str))?);
    }
    let segments: Vec<(String, Vec<String>)> = serde_json::from_value(text["segments"].clone())?;
    let mut phrases = 0;
    let numbered = segments.iter().map(|(text, ids)| {
        let number = (!ids.is_empty()).then_some(phrases);
        phrases += usize::from(!ids.is_empty());
        (text.as_str(), number)
    });
    Ok(Caption::from_segments(lmm.tokenizer(), numbered)?)
}

/// Ids before expansion: the image's tokens are one.
fn unexpanded<T: Copy>(ids: &[T], prepared: &Prepared) -> Vec<T> {
    let layout = &prepared.image.layout;
    [&ids[..layout.start + 1], &ids[layout.end()..]].concat()
}

fn check_input(case: &Case, prepared: &Prepared, caption: &Caption) -> TestResult {
    let layout = &prepared.image.layout;
    let ids = [prepared.token_ids.as_slice(), &caption.token_ids].concat();
    case.exact("input_ids", unexpanded(&ids, prepared), case.ids("input_ids", prepared)?)?;
    let prompt = unexpanded(&prepared.token_ids, prepared).len();
    let mask_ids = [vec![-1; prompt], caption.mask_ids.clone()].concat();
    // Some references mark the image's place with -100.
    let recorded: Vec<i64> = match case.record.get("mask_ids_rle") {
        Some(_) => unexpanded(&case.runs("mask_ids")?, prepared),
        None => case.list("mask_ids")?,
    };
    let recorded = recorded.into_iter().map(|id| id.max(-1) as i32).collect();
    case.exact("mask_ids", mask_ids, recorded)?;
    case.exact("expanded_length", ids.len(), case.list("expanded_length")?)?;
    case.exact("image_positions", [layout.start, layout.end()], case.list("image_positions")?)?;
    let geometry = &case.record["geometry"];
    let size = |part: &str, prefix: &str| -> (usize, usize) {
        let side =
            |name: &str| geometry[part][format!("{prefix}{name}")].as_u64().unwrap_or_default() as usize;
        (side("height"), side("width"))
    };
    let found = &prepared.image.geometry;
    case.exact("image_shape", found.image_shape, size("image_shape", ""))?;
    case.exact("padded_shape", found.padded_shape, size("padded_shape", ""))?;
    case.exact("before", found.before, size("padding", "before_"))?;
    case.exact("image_size_hw", [found.original.0, found.original.1], case.list("image_size_hw")?)
}

/// A tensor recorded under `name`: whole, as rows, or by its mean and deviation, whichever the case has.
fn check_recorded(case: &mut Case, name: &str, actual: &Tensor, absolute: f64, relative: f64) -> TestResult {
    let record = case.record[name].clone();
    let actual = match record.get("shape") {
        Some(shape) => actual.reshape(serde_json::from_value::<Vec<usize>>(shape.clone())?)?,
        None => actual.clone(),
    };
    case.check(name, &actual, absolute, relative)?;
    let rows = format!("{name}.rows");
    if case.golden.has(&rows) {
        let index: Vec<u32> = serde_json::from_value(record["rows_index_in_flattened_leading_dims"].clone())?;
        let flat = actual.flatten_to(actual.rank() - 2)?;
        let picked = flat.index_select(&Tensor::new(index, &Device::Cpu)?, 0)?;
        case.check(&rows, &picked, absolute, relative)?;
    }
    if let (Some(mean), Some(std)) = (record["mean"].as_f64(), record["std"].as_f64()) {
        let values = actual.flatten_all()?.to_dtype(DType::F64)?;
        let off = (values.mean_all()?.to_scalar::<f64>()? - mean).abs();
        let spread = (values.var(0)?.to_scalar::<f64>()?.sqrt() - std).abs();
        let tolerance = if case.noise.is_some() { relative * std } else { absolute };
        println!("{}: {name}: mean off by {off:.1e}, deviation by {spread:.1e}", case.golden.case);
        if off.max(spread) > tolerance {
            return Err(format!("{}: `{name}`: mean or deviation differs", case.golden.case).into());
        }
    }
    Ok(())
}

/// What the towers see, and the family's own tensors on the way to the projector.
fn check_intermediates(case: &mut Case, lmm: &dyn Lmm, prepared: &Prepared) -> TestResult {
    check_recorded(case, "pixel_values", &prepared.image.pixel_values, 1e-6, 0.005)?;
    for (name, tensor) in lmm.intermediates(&prepared.image)? {
        let (absolute, relative) = match name {
            // Resized in f32, then rounded to the model's type.
            "low_resized" => (1e-6, 1e-3),
            name if name.ends_with("_image") => (1e-6, 1e-5),
            _ => (2e-4, 0.04),
        };
        let known = !case.record[name].is_null() || case.golden.has(name);
        assert!(known, "{}: `{name}` is not recorded", case.golden.case);
        check_recorded(case, name, &tensor, absolute, relative)?;
    }
    Ok(())
}

/// Teacher-forced pass, maps, states, masks.
fn check_grounding(case: &mut Case, opened: &Opened) -> TestResult {
    let lmm = opened.lmm();
    let picture = read_image(&case.picture)?;
    let prepared = lmm.prepare(&picture, &[Turn::user(GROUNDING_INSTRUCTION)])?;
    let caption = caption(lmm, &case.record["text"])?;
    check_input(case, &prepared, &caption)?;
    check_intermediates(case, lmm, &prepared)?;

    let vision = lmm.vision_features(&prepared.image)?;
    case.check("vision_out", &vision, 2e-4, 0.04)?;
    if case.golden.has("vision_out.first16") {
        case.check("vision_out.first16", &vision.narrow(1, 0, 16)?, 2e-4, 0.04)?;
    }
    let projected = lmm.project(&prepared.image, &vision)?;
    match case.golden.tensors.get("projector_out") {
        Some(recorded) if case.record.get("fine_grid_hw").is_some() => {
            let (recorded, projected) = in_reading_order(recorded, &projected, &prepared.image)?;
            case.golden.tensors.insert("projector_out".into(), recorded);
            case.check("projector_out", &projected, 2e-4, 0.04)?;
        }
        _ => case.check("projector_out", &projected.unsqueeze(0)?, 2e-4, 0.04)?,
    }

    let start = prepared.token_ids.len();
    let mut ids = prepared.token_ids.clone();
    ids.extend_from_slice(&caption.token_ids);
    let read = Prepared { token_ids: ids, image: prepared.image };
    let mut cache = KvCache::new(lmm.decoder().config(), 8);
    let mut capture = Capture::from_position(start);
    let hidden = lmm.decoder().forward(&lmm.embed(&read)?, &mut cache, Some(&mut capture))?;

    let rows: Vec<usize> = case.list("hidden_row_positions")?;
    if let Ok(expected) = case.golden.get("hidden_rows").cloned() {
        let ids: Vec<u32> = rows.iter().map(|&row| read.token_ids[row]).collect();
        let mut embeds = lmm.decoder().embed(&ids)?;
        if let Some(scale) = lmm.decoder().config().embedding_scale {
            embeds =
                embeds.broadcast_mul(&Tensor::new(scale as f32, &Device::Cpu)?.to_dtype(embeds.dtype())?)?;
        }
        let states = Tensor::cat(&[&embeds.unsqueeze(0)?, &capture.hidden_rows(&rows)?], 0)?;
        assert_eq!(states.dims(), expected.dims());
        case.check("hidden_rows", &states, 2e-4, 0.04)?;
    }
    let phrases = caption.phrases()?;
    case.exact(
        "phrase_token_counts",
        phrases.iter().map(Vec::len).collect(),
        case.list::<Vec<usize>>("phrase_token_counts")?,
    )?;

    let positions: Vec<Vec<usize>> =
        phrases.iter().map(|phrase| phrase.iter().map(|token| start + token).collect()).collect();
    let maps = capture.phrase_maps(&cache, &read.image.layout, &positions, Merge::Mean)?;
    case.check("attn_merged", &maps, 2e-5, 0.12)?;
    if let Opened::Whole(grounder) = opened {
        check_head(case, grounder, (&picture, &caption), &capture.hidden_rows(&rows)?)?;
    }

    let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?;
    let next = lmm.decoder().logits(&last)?.squeeze(0)?;
    case.check("next_token_logits", &next, 1e-3, 0.06)?;
    let best = next.argmax(0)?.to_scalar::<u32>()?;
    case.exact("next_token_argmax", best, case.list("next_token_argmax")?)
}

/// From the phrases' maps and states to masks.
fn check_head(
    case: &mut Case,
    grounder: &Grounder,
    (picture, caption): (&RgbImage, &Caption),
    hidden_rows: &Tensor,
) -> TestResult {
    // The facade's own pass over the same input.
    let observation = grounder.observe(picture, caption)?;
    case.check("attn_merged", &observation.maps, 2e-5, 0.12)?;
    let states = weighted_hidden(hidden_rows, &grounder.head().text_layer_weights)?;
    case.check("text_states", &states, 2e-4, 0.04)?;
    let embeds = Tensor::cat(&grounder.head().text_embeds(&observation)?, 0)?;
    case.check("text_embeds", &embeds, 2e-4, 0.04)?;
    case.check("unet_logits", &grounder.head().mask_head.forward(&observation.maps)?, 3e-3, 0.12)?;
    let logits = grounder.decode(&observation)?;
    case.check("cnn_logits", &logits.coarse, 3e-3, 0.12)?;
    if case.noise.is_none() {
        check_refiner(case, grounder, &observation, &logits.coarse, 3e-3, 1e-2)?;
        check_sam_logits(case, &logits.refined, 1e-2)?;
    }
    check_heads_alone(case, grounder, observation)
}

fn strided(x: &Tensor, stride: usize) -> TestResult<Tensor> {
    let every = |size: usize| Tensor::arange_step(0u32, size as u32, stride as u32, x.device());
    let (_, height, width) = x.dims3()?;
    Ok(x.index_select(&every(height)?, 1)?.index_select(&every(width)?, 2)?)
}

fn check_sam_logits(case: &mut Case, refined: &Tensor, tolerance: f64) -> TestResult {
    case.golden.check("sam_logits", refined, tolerance)?;
    case.golden.check("sam_logits_stride4", &strided(refined, 4)?, tolerance)
}

/// Mask prompts, boxes and the decoder's own output.
fn check_refiner(
    case: &mut Case,
    grounder: &Grounder,
    observation: &Observation,
    coarse: &Tensor,
    prompts: f64,
    low_res: f64,
) -> TestResult {
    let refiner = grounder.head().refiner.as_ref().expect("the case has a refiner");
    let geometry = &observation.sam_geometry;
    let mask_prompts = refiner.mask_prompt(coarse, geometry)?;
    case.golden.check("mask_prompts_stride8", &strided(&mask_prompts, 8)?, prompts)?;
    let boxes: Vec<[[f64; 4]; 1]> = case.list("boxes")?;
    let found = refiner.boxes_in_image(coarse, geometry)?;
    case.exact("boxes", found.len(), boxes.len())?;
    for (found, [expected]) in found.iter().zip(&boxes) {
        let found = geometry.sam_from_image(*found);
        let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        if off > 1e-3 {
            return Err(format!("{}: box {found:?}, expected {expected:?}", case.golden.case).into());
        }
    }
    let text = grounder.head().text_embeds(observation)?;
    let low =
        refiner.low_res(&observation.sam_embedding, coarse, &text, geometry, &PromptOptions::default())?;
    case.golden.check("sam_low_res_stride8", &strided(&low, 8)?, low_res)
}

/// The heads on the recorded maps, logits and text embeddings, whatever the LMM's arithmetic.
fn check_heads_alone(case: &mut Case, grounder: &Grounder, mut observation: Observation) -> TestResult {
    observation.maps = case.golden.get("attn_merged")?.to_dtype(DType::F32)?;
    let coarse = grounder.decode(&observation)?.coarse;
    let recorded = case.golden.get("cnn_logits")?.clone();
    let off = max_abs_diff(&coarse, &recorded)?;
    println!("{}: U-Net alone: {off:.1e}", case.golden.case);
    assert!(off <= 1e-3, "{}: U-Net alone: {off:e}", case.golden.case);

    let embeds = case.golden.get("text_embeds")?.clone();
    let counts: Vec<usize> = case.list("phrase_token_counts")?;
    let mut first = 0;
    let text = counts.iter().map(|&count| {
        first += count;
        embeds.narrow(0, first - count, count)
    });
    let text = text.collect::<Result<Vec<_>, _>>()?;
    let refiner = grounder.head().refiner.as_ref().expect("the case has a refiner");
    let geometry = &observation.sam_geometry;
    let refined =
        refiner.refine(&observation.sam_embedding, &recorded, &text, geometry, &PromptOptions::default())?;
    check_sam_logits(case, &refined, 5e-3)
}

/// Greedy generation with rows of the generated tokens.
fn check_generation(case: &mut Case, opened: &Opened) -> TestResult {
    let lmm = opened.lmm();
    let picture = read_image(&case.picture)?;
    let question: String = case.list("question")?;
    let question = question.strip_prefix("<image>\n").unwrap_or(&question);
    let prepared = lmm.prepare(&picture, &[Turn::user(question)])?;
    let prompt_ids = case.ids("gen_prompt_ids", &prepared)?;
    case.exact("gen_prompt_ids", unexpanded(&prepared.token_ids, &prepared), prompt_ids)?;
    // Where the image's tokens were recorded one by one, the ids tell the length.
    if case.record.get("gen_prompt_ids_rle").is_none() {
        let length = prepared.token_ids.len();
        case.exact("gen_prompt_expanded_length", length, case.list("gen_prompt_expanded_length")?)?;
    } else {
        let layout = &prepared.image.layout;
        case.exact("gen_image_positions", [layout.start, layout.end()], case.list("gen_image_positions")?)?;
    }

    let expected: Vec<u32> = case.list("gen_ids")?;
    let mut cache = KvCache::new(lmm.decoder().config(), 8);
    let hidden = lmm.decoder().forward(&lmm.embed(&prepared)?, &mut cache, None)?;
    let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?;
    let mut capture = Capture::from_position(prepared.token_ids.len());
    let mut steps = Vec::new();
    let limits = Limits { max_new_tokens: expected.len(), stop_ids: &[] };
    let ids = generate(
        lmm.decoder(),
        &last,
        &mut cache,
        Some(&mut capture),
        limits,
        &mut Sampler::greedy(),
        |_, logits| {
            steps.push(logits.to_vec());
            ControlFlow::Continue(())
        },
    )?;
    let agreed = ids.iter().zip(&expected).take_while(|(a, b)| a == b).count();
    if let Some(noise) = &case.noise {
        // A step whose margin is within the noise may go either way; nothing later is comparable then.
        let change = noise["max_abs"]["gen.step_logits"].as_f64().unwrap_or(0.0);
        let margins: Vec<f64> = case.list("gen_step_margins")?;
        let sure = margins.iter().take_while(|&&margin| margin >= 4.0 * change).count();
        println!("{}: {agreed} of {} ids agree, {sure} must", case.golden.case, expected.len());
        assert!(agreed >= sure, "{}: ids {ids:?}, expected {expected:?}", case.golden.case);
        if agreed < expected.len() {
            return Ok(());
        }
    } else {
        case.exact("gen_ids", &ids, &expected)?;
    }
    let logits =
        steps.iter().map(|step| Tensor::new(step.as_slice(), &Device::Cpu)).collect::<Result<Vec<_>, _>>()?;
    case.check("gen.step_logits", &Tensor::stack(&logits, 0)?, 1e-3, 0.06)?;
    let positions: Vec<usize> = capture.positions().collect();
    case.exact("rows of generated tokens", positions.len(), expected.len() - 1)?;
    let layers = lmm.spec().layers;
    let rows =
        (0..layers).map(|layer| capture.image_attention(&cache, layer, &prepared.image.layout, &positions));
    case.check("gen.attn_rows", &Tensor::cat(&rows.collect::<Result<Vec<_>, _>>()?, 0)?, 2e-5, 0.12)?;
    let states = capture.hidden_rows(&positions)?;
    case.check("gen.hidden_rows", &states, 2e-4, 0.04)?;
    if case.record.get("ground_token_ranges").is_some() {
        check_generated_phrases(case, opened, &capture, &cache, &prepared.image)?;
    }
    let Opened::Whole(grounder) = opened else { return Ok(()) };
    let states = weighted_hidden(&states, &grounder.head().text_layer_weights)?;
    case.check("gen.text_states", &states, 2e-4, 0.04)
}

/// Grounding of ranges of generated tokens.
fn check_generated_phrases(
    case: &mut Case,
    opened: &Opened,
    capture: &Capture,
    cache: &KvCache,
    image: &ImageInput,
) -> TestResult {
    let ranges: Vec<(usize, usize)> = case.list("ground_token_ranges")?;
    let rows = capture.positions();
    let positions: Vec<Vec<usize>> =
        ranges.iter().map(|&(start, end)| (rows.start + start..rows.start + end).collect()).collect();
    let maps = capture.phrase_maps(cache, &image.layout, &positions, Merge::Mean)?;
    case.check("ground.attn_merged", &maps, 2e-5, 0.12)?;
    let Opened::Whole(grounder) = opened else { return Ok(()) };

    let (sam_embedding, sam_geometry) =
        grounder.sam().expect("the case has a SAM").encode_image(&read_image(&case.picture)?)?;
    let observation = Observation {
        maps,
        hidden: capture.hidden_rows(&rows.collect::<Vec<_>>())?,
        phrases: ranges.iter().map(|&(start, end)| (start..end).collect()).collect(),
        geometry: image.geometry,
        sam_embedding,
        sam_geometry,
    };
    let unet = grounder.head().mask_head.forward(&observation.maps)?;
    case.check("ground.unet_logits", &unet, 3e-3, 0.12)?;
    let logits = grounder.decode(&observation)?;
    let (height, width) = observation.sam_geometry.original;
    let full = bilinear(&logits.coarse.unsqueeze(0)?, height, width)?.squeeze(0)?;
    case.check("ground.cnn_logits_full", &full, 3e-3, 0.12)?;
    if case.noise.is_none() {
        case.golden.check("ground.sam_logits", &logits.refined, 1e-2)?;
    }
    // The mask head alone, whatever the LMM's arithmetic.
    let recorded = case.golden.get("ground.attn_merged")?.to_dtype(DType::F32)?;
    case.golden.check("ground.unet_logits", &grounder.head().mask_head.forward(&recorded)?, 1e-3)
}

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

/// A second question in a session, which re-reads only what is new, is answered as in a session of its own.
fn check_conversation(case: &mut Case, opened: &Opened) -> TestResult {
    let Opened::Whole(grounder) = opened else { return Ok(()) };
    let picture = read_image(&case.picture)?;
    let options = AnswerOptions { max_new_tokens: 6, phrases: None, ..AnswerOptions::default() };
    let mut session = grounder.start(&picture)?;
    grounder.ask(&mut session, "What is shown in this image?", &options)?;
    let second = grounder.ask(&mut session, "And what else?", &options)?;
    assert!(
        session.tokens_reused() >= session.layout().end(),
        "{}: the picture was read again",
        case.golden.case
    );
    let mut fresh = grounder.start(&picture)?;
    fresh.turns = session.turns[..3].to_vec();
    let again = grounder.reply(&mut fresh, &options, &mut |_| {})?;
    case.exact("the second answer", second.token_ids, again.token_ids)?;

    let stops = grounder.lmm().stop_ids();
    assert!(!stops.is_empty(), "{}: nothing ends an answer", case.golden.case);
    let spec = grounder.lmm().spec();
    let format = MODELS.iter().find(|(name, _)| *name == spec.name).map(|(_, format)| format);
    let word =
        format.and_then(|format| format.stop_word).and_then(|word| grounder.lmm().tokenizer().id(word));
    assert!(word.is_none_or(|id| stops.contains(&id)), "{}: {stops:?} without {word:?}", case.golden.case);
    Ok(())
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
