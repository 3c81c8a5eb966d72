//! Manifests, indexes, configurations and names of images, on any bytes: what is accepted is within its bounds and has one form.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nagaya_image::{Document, ImageConfig, LAYERS_MAX, Platform, Reference};

fuzz_target!(|input: &[u8]| {
    match Document::parse(input, "", "it") {
        Ok(Document::Manifest(manifest)) => assert!((1..=LAYERS_MAX).contains(&manifest.layers.len())),
        Ok(Document::Index(index)) => {
            if let Ok(chosen) = index.choose(&Platform::host(), "it") {
                assert!(index.manifests.contains(chosen));
            }
        }
        Err(_) => {}
    }
    if let Ok(config) = ImageConfig::parse(input, 1, "it") {
        assert_eq!(config.diff_ids.len(), 1);
        assert!(config.working_directory.starts_with('/'));
    }
    if let Some(reference) = std::str::from_utf8(input).ok().and_then(|text| text.parse::<Reference>().ok()) {
        assert_eq!(reference.to_string().parse::<Reference>().expect("its own form"), reference);
    }
});
