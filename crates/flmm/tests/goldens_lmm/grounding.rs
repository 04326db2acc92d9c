//! One teacher-forced pass, from picture and text to masks.

use candle_core::{DType, Tensor};
use flmm::Grounder;
use flmm::capture::{Capture, weighted_hidden};
use flmm::grounder::{Caption, Observation};
use flmm::image_input::read_image;
use flmm::layout::Merge;
use flmm::lmm::{GROUNDING_INSTRUCTION, ImageInput, Lmm, Prepared, Turn};
use flmm::sam::PromptOptions;
use flmm::text::KvCache;
use flmm::vision::anyres::unpad;
use image::RgbImage;

use crate::case::{Case, Opened, caption, unexpanded};
use crate::common::{TestResult, max_abs_diff};

fn check_input(case: &Case, prepared: &Prepared, caption: &Caption) -> TestResult {
    let layout = &prepared.images[0].layout;
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
    let found = &prepared.images[0].geometry;
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
        let picked = flat.index_select(&Tensor::new(index, flat.device())?, 0)?;
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
    check_recorded(case, "pixel_values", &prepared.images[0].pixel_values, 1e-6, 0.005)?;
    for (name, tensor) in lmm.intermediates(&prepared.images[0])? {
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
pub(crate) fn check_grounding(case: &mut Case, opened: &Opened) -> TestResult {
    let lmm = opened.lmm();
    let picture = read_image(&case.picture)?;
    let prepared = lmm.prepare(&picture, &[Turn::user(GROUNDING_INSTRUCTION)])?;
    let caption = caption(lmm, &case.record["text"])?;
    check_input(case, &prepared, &caption)?;
    check_intermediates(case, lmm, &prepared)?;

    let vision = lmm.vision_features(&prepared.images[0])?;
    case.check("vision_out", &vision, 2e-4, 0.04)?;
    if case.golden.has("vision_out.first16") {
        case.check("vision_out.first16", &vision.narrow(1, 0, 16)?, 2e-4, 0.04)?;
    }
    let projected = lmm.project(&prepared.images[0], &vision)?;
    match case.golden.tensors.get("projector_out") {
        Some(recorded) if case.record.get("fine_grid_hw").is_some() => {
            let (recorded, projected) = in_reading_order(recorded, &projected, &prepared.images[0])?;
            case.golden.tensors.insert("projector_out".into(), recorded);
            case.check("projector_out", &projected, 2e-4, 0.04)?;
        }
        _ => case.check("projector_out", &projected.unsqueeze(0)?, 2e-4, 0.04)?,
    }

    let start = prepared.token_ids.len();
    let mut ids = prepared.token_ids.clone();
    ids.extend_from_slice(&caption.token_ids);
    let read = Prepared { token_ids: ids, images: prepared.images };
    let mut cache = KvCache::new(lmm.decoder().config(), 8);
    let mut capture = Capture::from_position(start);
    let embeds = lmm.embed(&read)?;
    let hidden = lmm.decoder().forward(&embeds, &mut cache, Some(&mut capture))?;

    let rows: Vec<usize> = case.list("hidden_row_positions")?;
    if let Ok(expected) = case.golden.get("hidden_rows").cloned() {
        let ids: Vec<u32> = rows.iter().map(|&row| read.token_ids[row]).collect();
        let mut embeds = lmm.decoder().embed(&ids)?;
        if let Some(scale) = lmm.decoder().config().embedding_scale {
            embeds = embeds
                .broadcast_mul(&Tensor::new(scale as f32, embeds.device())?.to_dtype(embeds.dtype())?)?;
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
    let maps = capture.phrase_maps(&cache, &read.images[0].layout, &positions, Merge::Mean)?;
    case.check("attn_merged", &maps, 2e-5, 0.12)?;

    // The same bits where the maps are made within the pass and no keys are kept.
    let layout = &read.images[0].layout;
    let mut cache = KvCache::passing(lmm.decoder().config());
    let mut passing = Capture::of_phrases(start, layout.clone(), positions.clone(), Merge::Mean);
    let again = lmm.decoder().forward(&embeds, &mut cache, Some(&mut passing))?;
    assert_eq!((max_abs_diff(&again, &hidden)?, cache.len(), cache.bytes()), (0.0, embeds.dim(0)?, 0));
    assert!(lmm.decoder().forward(&embeds, &mut cache, None).is_err());
    let made = passing.phrase_maps(&cache, layout, &positions, Merge::Mean)?;
    assert_eq!(max_abs_diff(&made, &maps)?, 0.0);
    assert_eq!(max_abs_diff(&passing.hidden_rows(&rows)?, &capture.hidden_rows(&rows)?)?, 0.0);
    assert!(passing.phrase_maps(&cache, layout, &positions[..1], Merge::Max).is_err());
    assert!(passing.image_attention(&cache, 0, layout, &positions[0]).is_err());

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
    let pick = |from: &Tensor, index: Vec<u32>| from.index_select(&Tensor::new(index, from.device())?, 0);
    Ok((pick(&recorded.flatten_to(1)?, theirs)?, pick(projected, ours)?))
}
