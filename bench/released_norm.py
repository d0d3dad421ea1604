"""NoRM's search as it was released, in torch: for each candidate a sketch of the dense update and a full SVD of the result."""

import torch


def released_candidate(product: torch.Tensor, r: int, c: int, generator: torch.Generator):
    """(B', A', r left vectors) of one candidate. FLOPs: a product with the sketch, QR, two with Q, and an SVD of N × K numbers."""
    if c < r:
        Q, _ = torch.linalg.qr(product @ torch.randn(product.shape[1], c, generator=generator))
        U, S, Vh = torch.linalg.svd(Q.T @ product, full_matrices=False)
        lora_B, lora_A = Q @ U @ torch.diag(S), Vh
        product = lora_B @ lora_A
    else:
        lora_B = lora_A = None
    return lora_B, lora_A, torch.linalg.svd(product, full_matrices=False).U[:, :r]


def released_search(
    lora_A: torch.Tensor, lora_B: torch.Tensor, W: torch.Tensor, seed: int = 0
) -> tuple[int, dict[int, float]]:
    """(chosen c, {candidate: φ}): tau 0.1, candidates from 0.1 r on and r itself."""
    r = lora_A.shape[0]
    generator = torch.Generator().manual_seed(seed)
    U_W = torch.linalg.svd(W, full_matrices=False).U[:, :r]
    phi = {}
    for c in [*(max(1, int(r * 0.1 * i)) for i in range(1, 10)), r]:
        _, _, U = released_candidate(lora_B @ lora_A, r, c, generator)
        phi[c] = float(torch.linalg.matrix_norm(U.T @ U_W) ** 2 / r)
    return max(phi, key=phi.get), phi
