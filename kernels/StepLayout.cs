namespace Rollout.Kernels;

/// <summary>
/// The indices of one step, filled by the scheduler and read by the backend. All arrays are allocated once, at the capacity of the engine.
/// <code>
///   sequences     s = 0 ..            SequenceCount - 1
///   rows          RowStart[s] .. RowStart[s+1] - 1 are the tokens of sequence s, at ascending positions
///   block tables  BlockTables[s * MaxBlocks + position / BlockTokens] is the KV block of that position
///   output rows   OutputRows[o] is the row whose logits are wanted; ascending, no duplicates
///   samples       Queries[q].OutputIndex = o; several queries may share one output row; ascending in o
/// </code>
/// </summary>
public sealed class StepLayout
{
    public StepLayout(int maxRows, int maxSequences, int maxBlocks, int maxQueries, int maxAlternatives, int maxBiases)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(maxRows, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(maxSequences, 1);
        MaxBlocks = maxBlocks;
        TokenIds = new int[maxRows];
        Positions = new int[maxRows];
        RowStart = new int[maxSequences + 1];
        BlockTables = new int[(long)maxSequences * maxBlocks];
        OutputRows = new int[maxRows];
        Queries = new SampleQuery[maxQueries];
        Results = new SampleResult[maxQueries];
        AlternativeIds = new int[maxAlternatives];
        AlternativeLogProbs = new float[maxAlternatives];
        BiasIds = new int[maxBiases];
        BiasValues = new float[maxBiases];
    }

    /// <summary>Number of blocks in one row of the block table.</summary>
    public int MaxBlocks { get; }

    /// <summary>When true, nothing of the step is computed: see <see cref="Backend.Rehearsals"/>.</summary>
    public bool IsRehearsal { get; internal init; }

    public int SequenceCount { get; set; }

    /// <summary>[SequenceCount + 1], RowStart[0] = 0.</summary>
    public int[] RowStart { get; }

    /// <summary>[maxSequences, MaxBlocks].</summary>
    public int[] BlockTables { get; }

    public int RowCount => RowStart[SequenceCount];

    /// <summary>
    /// A token's id, or ~q: the token that the previous step, still in flight, samples for its query q. Only for backends that allow two
    /// steps in flight; where that query finds no token, the backend may use any.
    /// </summary>
    public int[] TokenIds { get; }

    public int[] Positions { get; }

    public int OutputCount { get; set; }

    public int[] OutputRows { get; }

    public int QueryCount { get; set; }

    public SampleQuery[] Queries { get; }

    /// <summary>Written by the backend, one per query, by the end of <see cref="Backend.FinishStep"/>.</summary>
    public SampleResult[] Results { get; }

    /// <summary>Token ids of alternatives, at each query's AlternativesStart, most probable first, ties by lower id.</summary>
    public int[] AlternativeIds { get; }

    /// <summary>Their model log-probabilities.</summary>
    public float[] AlternativeLogProbs { get; }

    /// <summary>Entries of the two arrays above in use.</summary>
    public int AlternativesCount { get; set; }

    /// <summary>Biased token ids of all queries, ascending within a query.</summary>
    public int[] BiasIds { get; private set; }

    /// <summary>Added to the logits before temperature; negative infinity forbids a token.</summary>
    public float[] BiasValues { get; private set; }

    /// <summary>Entries of the two bias arrays in use.</summary>
    public int BiasCount { get; private set; }

    /// <summary>Empties the step.</summary>
    public void Clear()
    {
        SequenceCount = 0;
        OutputCount = 0;
        QueryCount = 0;
        AlternativesCount = 0;
        BiasCount = 0;
    }

    /// <summary>
    /// Appends biases of one query and returns where they start. The arrays grow when a step needs more than any before it.
    /// </summary>
    public int AddBiases(ReadOnlySpan<int> ids, ReadOnlySpan<float> values)
    {
        int start = BiasCount;
        if (start + ids.Length > BiasIds.Length)
        {
            int length = Math.Max(start + ids.Length, 2 * BiasIds.Length);
            int[] grownIds = new int[length];
            float[] grownValues = new float[length];
            BiasIds.CopyTo(grownIds, 0);
            BiasValues.CopyTo(grownValues, 0);
            (BiasIds, BiasValues) = (grownIds, grownValues);
        }

        ids.CopyTo(BiasIds.AsSpan(start));
        values.CopyTo(BiasValues.AsSpan(start));
        BiasCount += ids.Length;
        return start;
    }
}

/// <summary>One query about a row of logits: sample a token, or give the log-probability of one.</summary>
public struct SampleQuery
{
    /// <summary>Index into OutputRows.</summary>
    public int OutputIndex;

    /// <summary>Token to score, or -1 to sample one.</summary>
    public int Target;

    /// <summary>0 takes the most probable token (lowest id among equals).</summary>
    public float Temperature;

    /// <summary>Keep the k most probable tokens; 0 keeps all.</summary>
    public int TopK;

    /// <summary>Keep the smallest set of most probable tokens whose mass reaches this; 1 keeps all.</summary>
    public float TopP;

    /// <summary>Keep tokens with at least this fraction of the largest probability; 0 keeps all.</summary>
    public float MinP;

    /// <summary>Key of the counter-based noise, together with SampleIndex and Position.</summary>
    public ulong Seed;

    public uint SampleIndex;

    /// <summary>Position, in the sequence, of the token being sampled.</summary>
    public int Position;

    public int BiasStart;

    public int BiasCount;

    public int AlternativesStart;

    /// <summary>How many of the most probable tokens to report.</summary>
    public int AlternativesCount;
}

/// <summary>The answer to a <see cref="SampleQuery"/>. Natural logarithms.</summary>
public struct SampleResult
{
    /// <summary>
    /// The answer where there is no distribution to draw from or score under: a logit is NaN or +infinity, all are -infinity, or the biases
    /// forbid every token. Other rows are not affected.
    /// </summary>
    public static readonly SampleResult Nothing = new() { Token = -1 };

    /// <summary>-1: <see cref="Nothing"/>.</summary>
    public int Token;

    /// <summary>Log-probability under the model: temperature 1, unmodified logits.</summary>
    public float LogProb;

    /// <summary>
    /// Log-probability under the distribution actually sampled. 0 when temperature is 0; equals LogProb for a scored target.
    /// </summary>
    public float SamplingLogProb;
}
