//! The tokenizer files of a Hugging Face folder.

use serde_json::{Value, json};
use text::{ChatOptions, Message, Role, Special, TextError, Tokenizer};
use types::{Timestamp, TokenizerSource};

use crate::vocabulary::{fixture, pieces};

const OPTIONS: ChatOptions = ChatOptions { add_generation_prompt: true, now: Timestamp(0) };

struct Folder {
    tokenizer: Value,
    config: Value,
    template: Option<String>,
    generation: Value,
}

impl Folder {
    fn tiny_llama() -> Self {
        let read = |name: &str| serde_json::from_slice(&fixture(&format!("tiny-llama/{name}"))).unwrap();
        Self {
            tokenizer: read("tokenizer.json"),
            config: read("tokenizer_config.json"),
            template: None,
            generation: read("generation_config.json"),
        }
    }

    fn load(&self) -> Result<Tokenizer, TextError> {
        Tokenizer::new(&TokenizerSource::HuggingFace {
            tokenizer_json: self.tokenizer.to_string().into_bytes(),
            tokenizer_config: Some(self.config.to_string().into_bytes()),
            chat_template: self.template.clone(),
            generation_config: Some(self.generation.to_string().into_bytes()),
        })
    }
}

#[test]
fn a_whole_folder_is_read() {
    let tiny = Folder::tiny_llama().load().unwrap();
    assert_eq!(tiny.vocab_size(), 320);
    assert_eq!((tiny.bos(), tiny.add_bos()), (Some(1), false));
    assert_eq!(tiny.eos_ids(), [2, 0]);
    assert_eq!(tiny.end_of_turn(), Some(2));
    let text = "The quick brown fox – naïve 🦊\n";
    let ids = tiny.encode(text, Special::Literal).unwrap();
    assert_eq!(tiny.decode(&ids), text);
    let messages = [Message::new(Role::User, "hi")];
    let text = tiny.render_chat(&messages, &OPTIONS).unwrap();
    assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    let ids = tiny.render_chat_tokens(&messages, &OPTIONS).unwrap();
    assert_eq!(ids, tiny.encode(&text, Special::Parse).unwrap());
}

#[test]
fn tokenizer_json_alone_is_enough() {
    let source = TokenizerSource::HuggingFace {
        tokenizer_json: fixture("tiny-llama/tokenizer.json"),
        tokenizer_config: None,
        chat_template: None,
        generation_config: None,
    };
    let tiny = Tokenizer::new(&source).unwrap();
    assert_eq!((tiny.bos(), tiny.has_chat_template()), (None, false));
    assert_eq!(tiny.eos_ids(), [2, 0], "by their texts");
    assert_eq!(tiny.render_chat_tokens(&[], &OPTIONS), Err(TextError::NoChatTemplate));
}

#[test]
fn all_ids_that_end_an_answer_are_found() {
    let mut folder = Folder::tiny_llama();
    folder.config["eos_token"] = json!({"content": "<|im_end|>", "special": true});
    folder.generation["eos_token_id"] = json!([7, 2]);
    assert_eq!(folder.load().unwrap().eos_ids(), [2, 7, 0]);
    folder.config["eos_token"] = Value::Null;
    folder.config["chat_template"] = Value::Null;
    let tiny = folder.load().unwrap();
    assert_eq!((tiny.eos_ids(), tiny.end_of_turn()), (&[7, 2, 0][..], Some(7)));
}

#[test]
fn bos_is_added_if_the_files_say_so() {
    let mut folder = Folder::tiny_llama();
    folder.tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    });
    let tiny = folder.load().unwrap();
    assert!(tiny.add_bos());
    assert_eq!(pieces(&tiny, &tiny.encode_prompt("a", Special::Literal).unwrap()), ["<|im_start|>", "a"]);
    folder.config["add_bos_token"] = json!(false);
    assert!(!folder.load().unwrap().add_bos());
}

#[test]
fn the_template_file_wins_over_the_config_and_lists_have_a_default() {
    let mut folder = Folder::tiny_llama();
    folder.config["chat_template"] = json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]);
    assert_eq!(folder.load().unwrap().render_chat(&[], &OPTIONS).unwrap(), "<|im_end|>");
    folder.template = Some("from the file".to_owned());
    assert_eq!(folder.load().unwrap().render_chat(&[], &OPTIONS).unwrap(), "from the file");
}

#[test]
fn special_tokens_are_not_made_by_normalisers() {
    let mut folder = Folder::tiny_llama();
    folder.tokenizer["normalizer"] = json!({"type": "Lowercase"});
    for token in folder.tokenizer["added_tokens"].as_array_mut().unwrap() {
        token["normalized"] = json!(true);
    }
    let tiny = folder.load().unwrap();
    let shouted = tiny.encode("<|IM_END|>", Special::Parse).unwrap();
    assert!(!shouted.contains(&2), "{shouted:?}");
    assert_eq!(tiny.encode("<|im_end|>", Special::Parse).unwrap(), [2]);
}

#[test]
fn broken_files_are_refused_by_name() {
    let refused = |change: fn(&mut Folder)| {
        let mut folder = Folder::tiny_llama();
        change(&mut folder);
        folder.load().unwrap_err().to_string()
    };
    assert!(refused(|f| f.tokenizer = json!({})).starts_with("tokenizer.json: "));
    assert!(refused(|f| f.config = json!([])).starts_with("tokenizer_config.json: is not a JSON object"));
    assert_eq!(
        refused(|f| f.config["eos_token"] = json!("<eot>")),
        "tokenizer_config.json: eos_token \"<eot>\" is not in the vocabulary"
    );
    assert!(
        refused(|f| f.generation["eos_token_id"] = json!("2"))
            .starts_with("generation_config.json: eos_token_id")
    );
    assert!(refused(|f| f.config["chat_template"] = json!(1)).contains("chat_template"));
    assert!(
        refused(|f| f.config["chat_template"] = json!("{% for %}"))
            .starts_with("chat template: syntax error")
    );
    assert!(refused(|f| f.tokenizer["decoder"] = json!(null)).contains("decoder null"));
    let misnumbered = refused(|f| f.tokenizer["added_tokens"][2]["id"] = json!(5));
    assert!(misnumbered.contains("added token \"<|im_end|>\" should be 5"), "{misnumbered}");
    let unigram = refused(|f| {
        f.tokenizer["model"] = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]});
        f.tokenizer["added_tokens"] = json!([]);
        f.config = json!({});
    });
    assert!(unigram.contains("only models of type BPE"), "{unigram}");
}
