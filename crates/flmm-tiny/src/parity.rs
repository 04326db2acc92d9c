//! The model that was trained and the model that `flmm` opens are two programs over one set of tensors: here they
//! must agree.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use flmm::lmm::Turn;
use flmm::text::KvCache;
use flmm::vision::preprocess::{LlavaProcessor, Normalisation, SizeRule};
use flmm::weights::Params;
use flmm_data::world::{self, Level, Split, WorldConfig};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::block::PackedMask;
use crate::config::LmmSizes;
use crate::decoder::{self, Decoder};
use crate::symbolic::Codes;
use crate::tower::{self, Projector, Tower};
use crate::{bundle, text};

#[test]
fn the_opened_model_computes_what_was_trained() {
    let tokenizer = text::train(world::vocabulary_texts(Level::One)).unwrap();
    let json = text::to_json(&tokenizer).unwrap();
    let raw: tokenizers::Tokenizer = json.parse().unwrap();
    let sizes = LmmSizes::shipped(raw.get_vocab_size(true));
    let codes = Codes::new(Level::One, sizes.width, 1);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let embeddings = codes.embeddings(Level::One, &raw, &mut rng).unwrap();
    let mut tensors = decoder::init(&sizes, &embeddings, codes.marks(), &mut rng).unwrap();
    tensors.extend(tower::init(&sizes, &mut rng).unwrap());
    // What the bundle's half precision keeps of them.
    let halved = |t: &Tensor| t.to_dtype(DType::F16).unwrap().to_dtype(DType::F32).unwrap();
    let tensors: BTreeMap<String, Tensor> =
        tensors.iter().map(|(name, t)| (name.clone(), halved(t))).collect();
    let folder = tempfile::tempdir().unwrap();
    bundle::lmm(folder.path(), &sizes, &tensors, &json).unwrap();
    let opened = flmm::lmm::open(folder.path(), DType::F32, &Device::Cpu).unwrap();

    let scene = world::generate(&WorldConfig::new(Level::One), Split::Test, 1, 0);
    let prepared = opened.prepare(&scene.image, &[Turn::user("Is there a dog?")]).unwrap();
    let mut cache = KvCache::new(opened.decoder().config(), prepared.token_ids.len());
    let found = opened.decoder().forward(&opened.embed(&prepared).unwrap(), &mut cache, None).unwrap();

    let params = Params::new("test", tensors.into_iter().collect());
    let (tower, projector) =
        (Tower::load(&sizes, &params).unwrap(), Projector::load(&sizes, &params).unwrap());
    let decoder = Decoder::load(&sizes, &params).unwrap();
    let processor = LlavaProcessor::new(sizes.image_size, SizeRule::MultiplyFirst, Normalisation::CLIP);
    let (pixels, _) = processor.process(&scene.image).unwrap();
    let patches =
        tower::patches(&pixels.flatten_all().unwrap().to_vec1().unwrap(), sizes.image_size, sizes.patch_size);
    let patches = Tensor::from_vec(patches, (1, sizes.image_tokens(), ()), &Device::Cpu).unwrap();
    let image = projector.forward(&tower.forward(&patches).unwrap()).unwrap();
    let start = prepared.images[0].layout.start;
    let (before, after) = (&prepared.token_ids[..start], &prepared.token_ids[start + sizes.image_tokens()..]);
    let x = [decoder.embed(before, 1).unwrap(), image, decoder.embed(after, 1).unwrap()];
    let x = Tensor::cat(&x, 1).unwrap();
    let rows = x.dim(1).unwrap();
    let mask = Arc::new(PackedMask { prefix: rows, starts: vec![0; rows] });
    let positions: Vec<u32> = (0..rows as u32).collect();
    let expected = decoder.forward(&x, &positions, &mask, 0, &[]).unwrap().hidden.squeeze(0).unwrap();

    assert_eq!(found.dims(), expected.dims());
    let difference =
        (found - &expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let size = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(difference <= 2e-4 * size, "states differ by {difference}, the largest is {size}");
}
