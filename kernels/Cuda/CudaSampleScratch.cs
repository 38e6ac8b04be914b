namespace Rollout.Kernels.Cuda;

/// <summary>
/// How sampling.cu cuts a row of logits over blocks, by the vocabulary alone, and where in one buffer they leave what they find for each
/// other: a counter a query, what a slice's block found [queries][slices], and the largest values of chunks [queries][2][chunks]. Offsets
/// and sizes are in bytes.
/// </summary>
/// <param name="Vocabulary">Logits of a row.</param>
internal readonly record struct CudaSampleScratch(int Vocabulary)
{
    /// <summary>Of a launch; more take turns.</summary>
    public const int MostQueries = 512;

    // As in sampling.cu.
    public const int SliceTokens = 4096;
    private const int ChunkTokens = 128;
    private const int FoundBytes = 40;

    /// <summary>Blocks that a query has.</summary>
    public int Slices => (Vocabulary + SliceTokens - 1) / SliceTokens;

    // Counters come first, whatever the vocabulary: they are 0 between launches.
    public static int Found => MostQueries * sizeof(uint);

    public long Tops => Found + ((long)MostQueries * Slices * FoundBytes);

    public long Bytes => Tops + (2L * MostQueries * ((Vocabulary + ChunkTokens - 1) / ChunkTokens) * sizeof(float));
}
