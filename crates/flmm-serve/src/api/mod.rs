//! What goes over the wire.

mod attention;
mod chat;
mod content;
mod ground;
mod grounding;
mod models;

pub use attention::{AttentionFormat, AttentionRequest, Merged};
pub use chat::{
    ChatCompletion, ChatRequest, Choice, Chunk, ChunkChoice, Delta, FinishReason, PromptTokensDetails,
    ResponseMessage, StopWords, StreamOptions, Usage,
};
pub use content::{Content, ImageUrl, Message, MessageRole, Part};
pub use ground::{GroundRequest, GroundResponse, ImageSize, Phrases, TimingsMs};
pub use grounding::{Annotation, Grounding, GroundingOptions, MaskData, MaskFormat, PhraseRule};
pub use models::{ModelDetail, ModelList, Status};
