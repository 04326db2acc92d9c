//! Tensor names of SAM: the public ones, and those of uploads in the layout of the `transformers` library.

use std::collections::HashMap;

use candle_core::Tensor;

/// Parts of names in that layout and what the public files call them. Applied one after the other.
const RENAMED: [(&str, &str); 17] = [
    ("vision_encoder.layers.", "image_encoder.blocks."),
    ("vision_encoder.", "image_encoder."),
    ("patch_embed.projection.", "patch_embed.proj."),
    ("neck.conv1.", "neck.0."),
    ("neck.layer_norm1.", "neck.1."),
    ("neck.conv2.", "neck.2."),
    ("neck.layer_norm2.", "neck.3."),
    ("mask_embed.conv1.", "mask_downscaling.0."),
    ("mask_embed.layer_norm1.", "mask_downscaling.1."),
    ("mask_embed.conv2.", "mask_downscaling.3."),
    ("mask_embed.layer_norm2.", "mask_downscaling.4."),
    ("mask_embed.conv3.", "mask_downscaling.6."),
    ("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings."),
    (".shared_embedding.positional_embedding", ".pe_layer.positional_encoding_gaussian_matrix"),
    ("upscale_conv1.", "output_upscaling.0."),
    ("upscale_layer_norm.", "output_upscaling.1."),
    ("upscale_conv2.", "output_upscaling.3."),
];

/// The tensors under their public names. Public files are left as they are.
pub(crate) fn canonical(tensors: HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    if !tensors.keys().any(|name| name.starts_with("vision_encoder.")) {
        return tensors;
    }
    let mut named: HashMap<String, Tensor> =
        tensors.into_iter().map(|(name, tensor)| (canonical_name(&name), tensor)).collect();
    // One table under two names, of which a file may have either.
    if let Some(table) = named.remove("shared_image_embedding.positional_embedding") {
        named.entry(POSITIONS.to_owned()).or_insert(table);
    }
    named
}

const POSITIONS: &str = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix";

fn canonical_name(name: &str) -> String {
    let mut name = name.to_owned();
    for (theirs, public) in RENAMED {
        name = name.replace(theirs, public);
    }
    // Small networks of three layers: `proj_in`, `layers.0`, `proj_out`.
    let is_small = name.contains("iou_prediction_head.") || name.contains("output_hypernetworks_mlps.");
    if is_small {
        name = name.replace(".layers.0.", ".layers.1.");
        name = name.replace(".proj_in.", ".layers.0.").replace(".proj_out.", ".layers.2.");
    }
    name.replace("layer_norm_final_attn.", "norm_final_attn.").replace(".layer_norm", ".norm")
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn names_of_both_layouts_meet() {
        for (theirs, public) in [
            ("vision_encoder.pos_embed", "image_encoder.pos_embed"),
            ("vision_encoder.patch_embed.projection.weight", "image_encoder.patch_embed.proj.weight"),
            ("vision_encoder.layers.3.layer_norm1.bias", "image_encoder.blocks.3.norm1.bias"),
            ("vision_encoder.layers.3.attn.rel_pos_h", "image_encoder.blocks.3.attn.rel_pos_h"),
            ("vision_encoder.layers.3.mlp.lin2.weight", "image_encoder.blocks.3.mlp.lin2.weight"),
            ("vision_encoder.neck.layer_norm2.weight", "image_encoder.neck.3.weight"),
            (
                "prompt_encoder.shared_embedding.positional_embedding",
                "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
            ),
            ("prompt_encoder.point_embed.2.weight", "prompt_encoder.point_embeddings.2.weight"),
            ("prompt_encoder.mask_embed.layer_norm2.bias", "prompt_encoder.mask_downscaling.4.bias"),
            ("prompt_encoder.mask_embed.conv3.bias", "prompt_encoder.mask_downscaling.6.bias"),
            ("prompt_encoder.no_mask_embed.weight", "prompt_encoder.no_mask_embed.weight"),
            ("prompt_encoder.not_a_point_embed.weight", "prompt_encoder.not_a_point_embed.weight"),
            (
                "mask_decoder.transformer.layers.0.layer_norm4.bias",
                "mask_decoder.transformer.layers.0.norm4.bias",
            ),
            (
                "mask_decoder.transformer.layer_norm_final_attn.bias",
                "mask_decoder.transformer.norm_final_attn.bias",
            ),
            (
                "mask_decoder.transformer.layers.0.mlp.lin1.bias",
                "mask_decoder.transformer.layers.0.mlp.lin1.bias",
            ),
            ("mask_decoder.upscale_layer_norm.weight", "mask_decoder.output_upscaling.1.weight"),
            (
                "mask_decoder.output_hypernetworks_mlps.2.proj_out.bias",
                "mask_decoder.output_hypernetworks_mlps.2.layers.2.bias",
            ),
            (
                "mask_decoder.iou_prediction_head.proj_in.bias",
                "mask_decoder.iou_prediction_head.layers.0.bias",
            ),
            (
                "mask_decoder.iou_prediction_head.layers.0.bias",
                "mask_decoder.iou_prediction_head.layers.1.bias",
            ),
        ] {
            assert_eq!(canonical_name(theirs), public);
        }
    }

    #[test]
    fn public_files_are_left_alone() {
        let one = || Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let name = "mask_decoder.iou_prediction_head.layers.0.bias".to_owned();
        assert!(canonical(HashMap::from([(name.clone(), one())])).contains_key(&name));
        let theirs = ["vision_encoder.pos_embed", "shared_image_embedding.positional_embedding"];
        let found = canonical(theirs.map(|name| (name.to_owned(), one())).into());
        let mut found: Vec<_> = found.into_keys().collect();
        found.sort();
        assert_eq!(found, ["image_encoder.pos_embed", POSITIONS]);
    }
}
