namespace Rollout.Kernels.Cuda;

/// <summary>What a matmul does with its sums.</summary>
internal enum MatMulOutput
{
    /// <summary>Writes them, fp32.</summary>
    Fp32,

    /// <summary>Adds them to the output's values, fp32.</summary>
    AddFp32,

    /// <summary>Writes them in the storage type, each rounded once. With fp32 storage the same as <see cref="Fp32"/>.</summary>
    Stored,
}

/// <summary>
/// An algorithm of cuBLASLt for one weight shape, and what was measured of it: an entry of <see cref="CudaBackend.SurveyMatMul"/>.
/// </summary>
/// <param name="Algorithm">All of its settings as the library keeps them, 64 bytes in hexadecimal.</param>
/// <param name="Settings">
/// The same in readable form: "id 66, tile 20, stages 36, split-k 1, ...", by the numbers of the library's header.
/// </param>
/// <param name="WorkspaceBytes">The most workspace that it needs, at any of the row counts.</param>
/// <param name="Rows">Its result at each requested row count, in that order.</param>
internal sealed record MatMulCandidate(string Algorithm, string Settings, long WorkspaceBytes, IReadOnlyList<MatMulCandidateRows> Rows)
{
    /// <summary>Whether it is among those that serve this shape, of the class that the rule chose.</summary>
    public bool IsChosen { get; init; }
}

/// <summary>One algorithm at one row count.</summary>
/// <param name="Rows">The row count.</param>
/// <param name="Rank">Its place among the library's proposals for this many rows, from 0; -1 where it is not proposed.</param>
/// <param name="Failure">Why it did not run; null where it did. Without a run there are no digests and no time.</param>
/// <param name="Digest">
/// Of the first rows of its output (at most <see cref="MatMulProbe.Period"/>; all candidates multiply the same numbers): equal digests at
/// one row count are equal bits. Hexadecimal.
/// </param>
/// <param name="BiasDigest">The same with a bias; "" for the storage type, which has none.</param>
/// <param name="AddDigest">The same, added to the output's values; "" for the storage type.</param>
/// <param name="KeepsRows">
/// Whether each row has the bits that it has among <see cref="MatMulProbe.ReferenceRows"/>, at every place, in every form.
/// </param>
/// <param name="Seconds">
/// Of one matmul, from events around many in a graph, weights not in the L2 cache; infinity where it did not run or cannot be captured in a
/// graph.
/// </param>
internal sealed record MatMulCandidateRows(
    int Rows, int Rank, string? Failure, string Digest, string BiasDigest, string AddDigest, bool KeepsRows, double Seconds);
