#![allow(clippy::unwrap_used)]

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::*;

fn any_manifest() -> impl Strategy<Value = Manifest> {
    let any_chunk = (btree_set(0..CHUNK_BLOCKS, 1..40), any::<[u8; 32]>());
    (btree_map(0u32..1_000, any_chunk, 0..12), 0u64..10_000_000).prop_map(|(chunks, beyond)| {
        let chunks: Vec<Chunk> = chunks
            .into_iter()
            .map(|(index, (blocks, digest))| {
                let mut map = BlockMap::default();
                blocks.into_iter().for_each(|block| map.insert(block));
                Chunk { index, digest: Digest::from_bytes(digest), blocks: map }
            })
            .collect();
        let used =
            chunks.last().map_or(0, |chunk| chunk.offset() + chunk.blocks.last().unwrap() as u64 * BLOCK_BYTES + 1);
        Manifest { image_size: used + beyond, chunks }
    })
}

fn example() -> Manifest {
    let mut blocks = BlockMap::default();
    [0, 1, 5].into_iter().for_each(|block| blocks.insert(block));
    let chunk = |index| Chunk { index, digest: Digest::of(b"x"), blocks };
    Manifest { image_size: 3 * CHUNK_BYTES, chunks: vec![chunk(0), chunk(2)] }
}

proptest! {
    #[test]
    fn what_is_encoded_is_parsed(manifest in any_manifest()) {
        prop_assert_eq!(Manifest::parse(&manifest.encode()), Ok(manifest));
    }

    #[test]
    fn what_is_parsed_has_one_form(manifest in any_manifest(), at in any::<prop::sample::Index>(), bit in 0..8) {
        let mut bytes = manifest.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        if let Ok(other) = Manifest::parse(&bytes) {
            prop_assert_ne!(&other, &manifest);
            prop_assert_eq!(other.encode(), bytes);
        }
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in vec(any::<u8>(), 0..600), whole in any::<bool>()) {
        let mut bytes = bytes;
        if whole {
            let header = example().encode();
            let length = HEADER_BYTES.min(bytes.len());
            bytes[..length].copy_from_slice(&header[..length]);
        }
        if let Ok(manifest) = Manifest::parse(&bytes) {
            prop_assert_eq!(manifest.encode(), bytes);
        }
    }

    #[test]
    fn runs_are_the_blocks(blocks in btree_set(0..CHUNK_BLOCKS, 0..200)) {
        let mut map = BlockMap::default();
        blocks.iter().for_each(|block| map.insert(*block));
        prop_assert_eq!(map.runs().flatten().collect::<Vec<_>>(), blocks.iter().copied().collect::<Vec<_>>());
        prop_assert_eq!(map.count(), blocks.len() as u64);
        prop_assert_eq!(map.last(), blocks.last().copied());
        prop_assert_eq!(map.is_empty(), blocks.is_empty());
        let ends: Vec<_> = map.runs().collect();
        prop_assert!(ends.windows(2).all(|pair| pair[0].end < pair[1].start), "no two runs touch");
    }
}

#[test]
fn the_format_is_the_documented_one() {
    let bytes = example().encode();
    assert_eq!(&bytes[..8], b"NAGAYAIM");
    assert_eq!(bytes[8..24], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0xC0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[24 + 164..24 + 168], [2, 0, 0, 0]);
    assert_eq!(&bytes[28..60], Digest::of(b"x").as_bytes());
    assert_eq!(bytes[60..69], [0b10_0011, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes.len(), 24 + 2 * 164);
}

#[test]
fn what_no_writer_makes_is_refused() {
    let refused = |change: fn(&mut Manifest)| {
        let mut manifest = example();
        change(&mut manifest);
        Manifest::parse(&manifest.encode()).unwrap_err()
    };
    refused(|manifest| manifest.chunks.reverse());
    refused(|manifest| manifest.chunks[1].index = 0);
    refused(|manifest| manifest.chunks[0].blocks = BlockMap::default());
    refused(|manifest| manifest.image_size = 2 * CHUNK_BYTES + 5 * BLOCK_BYTES);
    refused(|manifest| manifest.image_size = 0);
    refused(|manifest| manifest.image_size = u64::MAX);
    refused(|manifest| manifest.chunks[1].index = u32::MAX);
    let mut smallest = example();
    smallest.image_size = 2 * CHUNK_BYTES + 5 * BLOCK_BYTES + 1;
    Manifest::parse(&smallest.encode()).unwrap();

    let bytes = example().encode();
    for length in 0..bytes.len() {
        Manifest::parse(&bytes[..length]).unwrap_err();
    }
    let mut newer = bytes.clone();
    newer[8] = 2;
    assert_eq!(Manifest::parse(&newer), Err(ManifestError::Version(2)));
    let mut claims_more = bytes.clone();
    claims_more[15] = 0xFF;
    Manifest::parse(&claims_more).unwrap_err();
    Manifest::parse(&[bytes, vec![0]].concat()).unwrap_err();
}
