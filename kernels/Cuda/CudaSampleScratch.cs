namespace Rollout.Kernels.Cuda;

/// <summary>
/// How sampling.cu divides a row of logits among blocks, which depends on the vocabulary alone, and where in one buffer the blocks exchange
/// results: a counter a query, the result of each slice's block [queries][slices], and the largest values of chunks [queries][2][chunks].
/// Offsets and sizes are in bytes.
/// </summary>
/// <param name="Vocabulary">Logits of a row.</param>
internal readonly record struct CudaSampleScratch(int Vocabulary)
{
    /// <summary>Most queries of a launch; more are split over several launches.</summary>
    public const int MostQueries = 512;

    // As in sampling.cu.
    public const int SliceTokens = 4096;
    private const int ChunkTokens = 128;
    private const int FoundBytes = 40;

    /// <summary>Blocks of a query.</summary>
    public int Slices => (Vocabulary + SliceTokens - 1) / SliceTokens;

    // Counters come first, whatever the vocabulary: they are 0 between launches.
    public static int Found => MostQueries * sizeof(uint);

    public long Tops => Found + ((long)MostQueries * Slices * FoundBytes);

    public long Bytes => Tops + (2L * MostQueries * ((Vocabulary + ChunkTokens - 1) / ChunkTokens) * sizeof(float));
}
