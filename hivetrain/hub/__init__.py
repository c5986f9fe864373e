"""The model hub: where states are published, and data and models come from.

- `store`: the seams `ModelStore` and `ArtefactStore`, and what every implementation shares
- `client`: `HubStore`, `HubDataset`, `publish_dataset` and `snapshot`, on any hub endpoint
- `memory`: `MemoryStore`, for tests
- `dataset`: the seam `DatasetFiles`, and `LocalDataset`
- `remote`: the one adapter to `huggingface_hub`
- `server`: the local hub, as a process; `routes`, `wire`, `answers`, `storage`, `records` and `blobs` are its parts
"""
