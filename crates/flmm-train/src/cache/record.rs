//! One sample or one picture as bytes, and back.
//!
//! The payload of a record is a safetensors file in memory, so that it can be looked at with common tools. A sample
//! has `maps`, `hidden`, `masks` (run lengths, row by row, background first) and `token_labels`; a picture has
//! `sam_embedding`, which all samples of the picture share.

use std::borrow::Cow;
use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use flmm::grounder::Observation;
use flmm::sam::SamGeometry;
use flmm::{Error, Geometry, Result};
use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::key::{CacheKey, MapValues, Rows, Values};
use crate::digest;
use crate::head::HeadSample;

/// Name of the JSON in a sample's safetensors metadata.
const META: &str = "sample";

/// What of a sample is not tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    /// Key of the picture's record.
    picture: String,
    phrases: Vec<Vec<usize>>,
    geometry: Geometry,
    sam_geometry: SamGeometry,
    /// `[N, H, W]` of the masks.
    masks: [usize; 3],
}

/// A sample that lacks its picture's SAM embedding.
pub(super) struct Stored {
    /// Key of the picture's record.
    pub(super) picture: String,
    maps: Tensor,
    hidden: Tensor,
    masks: Tensor,
    token_labels: Option<Tensor>,
    meta: Meta,
}

impl Stored {
    pub(super) fn with_embedding(self, sam_embedding: Tensor) -> HeadSample {
        let Meta { phrases, geometry, sam_geometry, .. } = self.meta;
        let (maps, hidden) = (self.maps, self.hidden);
        HeadSample {
            observation: Observation { maps, hidden, phrases, geometry, sam_embedding, sam_geometry },
            masks: self.masks,
            token_labels: self.token_labels,
        }
    }
}

/// The two records of a sample.
pub(super) struct Encoded {
    /// Name of the picture's record: a digest of it, so that samples of one picture share it.
    pub(super) name: String,
    pub(super) picture: Vec<u8>,
    pub(super) sample: Vec<u8>,
}

pub(super) fn encode(sample: &HeadSample, key: &CacheKey) -> Result<Encoded> {
    let embedding = narrowed(&sample.observation.sam_embedding, key.values)?;
    let picture = serialised(vec![("sam_embedding", Bytes::of(&embedding)?)], None)?;
    let name = digest::short(Sha256::new_with_prefix(&picture));
    Ok(Encoded { sample: encode_sample(sample, &name, key)?, name, picture })
}

fn encode_sample(sample: &HeadSample, picture: &str, key: &CacheKey) -> Result<Vec<u8>> {
    let observation = &sample.observation;
    let (mut phrases, mut hidden) = (observation.phrases.clone(), observation.hidden.clone());
    if key.rows == Rows::Phrases {
        let rows: Vec<u32> = phrases.iter().flatten().map(|&row| row as u32).collect();
        let mut next = 0..rows.len();
        phrases.iter_mut().for_each(|phrase| *phrase = next.by_ref().take(phrase.len()).collect());
        hidden = hidden.index_select(&Tensor::from_vec(rows, next.end, hidden.device())?, 1)?;
    }
    let mut tensors = maps_tensors(&observation.maps, key)?;
    tensors.push(("hidden", Bytes::of(&narrowed(&hidden, key.values)?)?));
    let masks = sample.masks.dims3().map(|(n, h, w)| [n, h, w])?;
    tensors.push(("masks", Bytes::of(&run_lengths(&sample.masks)?)?));
    if let (Rows::All, Some(labels)) = (key.rows, &sample.token_labels) {
        tensors.push(("token_labels", Bytes::of(&labels.to_dtype(DType::U8)?)?));
    }
    let meta = Meta {
        picture: picture.to_owned(),
        phrases,
        geometry: observation.geometry,
        sam_geometry: observation.sam_geometry,
        masks,
    };
    let json = serde_json::to_string(&meta).map_err(|e| unreadable(&e))?;
    serialised(tensors, Some(HashMap::from([(META.to_owned(), json)])))
}

pub(super) fn decode_sample(bytes: &[u8]) -> Result<Stored> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| unreadable(&e))?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| unreadable(&e))?;
    let json = header.metadata().as_ref().and_then(|metadata| metadata.get(META));
    let meta: Meta = serde_json::from_str(json.map_or("", String::as_str)).map_err(|e| unreadable(&e))?;
    let maps = match tensor(&file, "maps_scale") {
        Ok(scale) => {
            let scaled = tensor(&file, "maps")?.to_dtype(DType::F32)?;
            // A value of 1 may come back one rounding above it, which the mask head would refuse.
            scaled.broadcast_mul(&scale.unsqueeze(2)?.unsqueeze(3)?)?.minimum(1f32)?
        }
        Err(_) => tensor(&file, "maps")?.to_dtype(DType::F32)?,
    };
    Ok(Stored {
        picture: meta.picture.clone(),
        maps,
        hidden: tensor(&file, "hidden")?,
        masks: from_run_lengths(&tensor(&file, "masks")?, meta.masks)?,
        token_labels: tensor(&file, "token_labels").ok(),
        meta,
    })
}

pub(super) fn decode_picture(bytes: &[u8]) -> Result<Tensor> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| unreadable(&e))?;
    Ok(tensor(&file, "sam_embedding")?.to_dtype(DType::F32)?)
}

/// `maps [N, C, h, w]` as they are stored, with `maps_scale [N, C]` where they are scaled.
fn maps_tensors(maps: &Tensor, key: &CacheKey) -> Result<Vec<(&'static str, Bytes)>> {
    let bits = match (key.maps, key.values) {
        (MapValues::Same, Values::F32 | Values::Bf16) => {
            return Ok(vec![("maps", Bytes::of(&narrowed(maps, key.values)?)?)]);
        }
        (MapValues::Same, Values::F16) => DType::F16,
        (MapValues::Int8, _) => DType::U8,
    };
    let (n, channels, h, w) = maps.dims4()?;
    let mut values = maps.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    let mut scales = Vec::with_capacity(n * channels);
    for map in values.chunks_mut((h * w).max(1)) {
        let largest = map.iter().copied().fold(0f32, f32::max);
        let scale = match bits {
            _ if largest == 0.0 => 1.0,
            DType::U8 => largest / 255.0,
            _ => largest.log2().ceil().exp2(),
        };
        map.iter_mut().for_each(|value| *value /= scale);
        if bits == DType::U8 {
            map.iter_mut().for_each(|value| *value = value.round());
        }
        scales.push(scale);
    }
    let scaled = Tensor::from_vec(values, (n, channels, h, w), &Device::Cpu)?.to_dtype(bits)?;
    let scales = Tensor::from_vec(scales, (n, channels), &Device::Cpu)?;
    Ok(vec![("maps", Bytes::of(&scaled)?), ("maps_scale", Bytes::of(&scales)?)])
}

/// `x` in the stored type. Hidden states beyond the range of f16 (some models have such) are stored in bf16.
fn narrowed(x: &Tensor, values: Values) -> Result<Tensor> {
    let dtype = match values {
        Values::F32 => DType::F32,
        Values::Bf16 => DType::BF16,
        Values::F16 => {
            let empty = x.elem_count() == 0;
            let wide = x.to_dtype(DType::F32)?;
            let largest = if empty { 0.0 } else { wide.abs()?.max_all()?.to_scalar::<f32>()? };
            if largest < f32::from(half::f16::MAX) { DType::F16 } else { DType::BF16 }
        }
    };
    Ok(x.to_device(&Device::Cpu)?.to_dtype(dtype)?)
}

/// Lengths of runs of equal pixels of `masks [N, H, W]`, background first, as u32.
fn run_lengths(masks: &Tensor) -> Result<Tensor> {
    let pixels = masks.to_device(&Device::Cpu)?.to_dtype(DType::U8)?.flatten_all()?.to_vec1::<u8>()?;
    let (mut runs, mut inside) = (vec![0u32], false);
    for pixel in pixels {
        if (pixel != 0) != inside {
            inside = !inside;
            runs.push(0);
        }
        if let Some(run) = runs.last_mut() {
            *run += 1;
        }
    }
    let count = runs.len();
    Ok(Tensor::from_vec(runs, count, &Device::Cpu)?)
}

fn from_run_lengths(runs: &Tensor, shape: [usize; 3]) -> Result<Tensor> {
    let pixels = shape.iter().product();
    let mut out = Vec::with_capacity(pixels);
    for (i, run) in runs.to_vec1::<u32>()?.into_iter().enumerate() {
        let end = out.len().saturating_add(run as usize).min(pixels);
        out.resize(end, u8::from(i % 2 == 1));
    }
    Ok(Tensor::from_vec(out, &shape, &Device::Cpu)?)
}

/// A tensor's elements, little-endian.
struct Bytes {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Bytes {
    fn of(tensor: &Tensor) -> Result<Self> {
        let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
        let (dtype, data) = match flat.dtype() {
            DType::U8 => (Dtype::U8, flat.to_vec1::<u8>()?),
            DType::U32 => (Dtype::U32, flat.to_vec1::<u32>()?.iter().flat_map(|v| v.to_le_bytes()).collect()),
            DType::F16 => {
                (Dtype::F16, flat.to_vec1::<half::f16>()?.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
            DType::BF16 => {
                (Dtype::BF16, flat.to_vec1::<half::bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
            _ => {
                let wide = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                (Dtype::F32, wide.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
        };
        Ok(Self { dtype, shape: tensor.dims().to_vec(), data })
    }
}

impl View for &Bytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

fn serialised(
    tensors: Vec<(&'static str, Bytes)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>> {
    let views = tensors.iter().map(|(name, bytes)| (*name, bytes));
    safetensors::serialize(views, metadata).map_err(|e| unreadable(&e))
}

fn tensor(file: &SafeTensors<'_>, name: &str) -> Result<Tensor> {
    let view = file.tensor(name).map_err(|e| unreadable(&e))?;
    let dtype = match view.dtype() {
        Dtype::U8 => DType::U8,
        Dtype::U32 => DType::U32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        other => return Err(unreadable(&format!("tensor `{name}` is {other:?}"))),
    };
    Ok(Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?)
}

fn unreadable(reason: &dyn std::fmt::Display) -> Error {
    Error::request(format!("the record cannot be read: {reason}"), "rebuild the cache")
}

#[cfg(test)]
mod tests {
    use super::super::key::test_key;
    use super::*;

    fn sample() -> HeadSample {
        let random = |shape: &[usize], scale: f64| {
            (Tensor::rand(0f32, 1.0, shape, &Device::Cpu).unwrap() * scale).unwrap()
        };
        HeadSample {
            observation: Observation {
                // As small as real attention gets: plain f16 would lose most of its bits.
                maps: random(&[2, 3, 4, 5], 1e-6),
                hidden: random(&[2, 6, 4], 10.0),
                phrases: vec![vec![4], vec![1, 2]],
                geometry: Geometry {
                    original: (7, 9),
                    image_shape: (4, 5),
                    before: (0, 0),
                    padded_shape: (5, 5),
                    crop: true,
                },
                sam_embedding: random(&[1, 4, 2, 2], 1.0),
                sam_geometry: SamGeometry { original: (7, 9), resized: (14, 18) },
            },
            masks: Tensor::rand(0f32, 2.0, (2, 7, 9), &Device::Cpu).unwrap().to_dtype(DType::U8).unwrap(),
            token_labels: Some(Tensor::new(&[0f32, 1., 1., 0., 1., 0.], &Device::Cpu).unwrap()),
        }
    }

    fn round_trip(sample: &HeadSample, key: &CacheKey) -> HeadSample {
        let encoded = encode(sample, key).unwrap();
        let stored = decode_sample(&encoded.sample).unwrap();
        assert_eq!(stored.picture, encoded.name);
        stored.with_embedding(decode_picture(&encoded.picture).unwrap())
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn worst(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        let largest = values(a).into_iter().fold(0f32, |m, v| m.max(v.abs()));
        values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest
    }

    #[test]
    fn f32_is_exact_and_narrow_types_round() {
        let sample = sample();
        for (values_type, maps, bound) in [
            (Values::F32, MapValues::Same, 0.0),
            (Values::F16, MapValues::Same, 1.0 / 2048.0),
            (Values::Bf16, MapValues::Same, 1.0 / 256.0),
            (Values::F16, MapValues::Int8, 1.0 / 500.0),
        ] {
            let key = CacheKey { values: values_type, maps, rows: Rows::All, ..test_key() };
            let back = round_trip(&sample, &key);
            let (a, b) = (&sample.observation, &back.observation);
            assert!(worst(&a.maps, &b.maps) <= bound, "{values_type:?} {maps:?}");
            assert!(worst(&a.hidden, &b.hidden) <= bound, "{values_type:?}");
            assert!(worst(&a.sam_embedding, &b.sam_embedding) <= bound, "{values_type:?}");
            assert_eq!(values(&sample.masks), values(&back.masks));
            assert_eq!(values(sample.token_labels.as_ref().unwrap()), values(&back.token_labels.unwrap()));
            assert_eq!((&a.phrases, a.geometry), (&b.phrases, b.geometry));
        }
    }

    #[test]
    fn only_rows_of_phrases_are_kept() {
        let sample = sample();
        let back = round_trip(&sample, &test_key());
        assert_eq!(back.observation.phrases, [vec![0], vec![1, 2]]);
        assert!(back.token_labels.is_none());
        let rows = Tensor::new(&[4u32, 1, 2], &Device::Cpu).unwrap();
        let expected = sample.observation.hidden.index_select(&rows, 1).unwrap();
        assert_eq!(values(&expected), values(&back.observation.hidden));
    }

    #[test]
    fn a_map_of_one_does_not_leave_its_range_and_large_states_fit() {
        let mut sample = sample();
        sample.observation.maps = Tensor::ones((2, 3, 4, 5), DType::F32, &Device::Cpu).unwrap();
        sample.observation.hidden = (sample.observation.hidden * 1e5).unwrap();
        let key = CacheKey { values: Values::F16, maps: MapValues::Int8, ..test_key() };
        let back = round_trip(&sample, &key);
        assert!(values(&back.observation.maps).iter().all(|&v| v == 1.0));
        assert!(values(&back.observation.hidden).iter().all(|v| v.is_finite()));
    }

    #[test]
    fn nonsense_is_an_error() {
        assert!(decode_sample(b"nothing").is_err());
        assert!(decode_picture(&[]).is_err());
    }
}
