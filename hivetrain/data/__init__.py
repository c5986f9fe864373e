"""From a pinned data set to the token windows of one miner's round.

- `corpus`: `build_corpus`, the embedded data set, written at genesis.
- `tokenizer`: `train_tokenizer`, `save_tokenizer`, `load_tokenizer`, `tokenizer_sha256`.
- `index`: `RowGroup`, `DatasetIndex`, `build_index`, `parse_index`, `config_folder`.
- `assignment`: `assigned_row_groups`, `num_slots`, `permute`, `NoSlot`.
- `reader`: `SegmentReader`, `RoundData`, `load_round`, `load_heldout`, `pack`.
"""
