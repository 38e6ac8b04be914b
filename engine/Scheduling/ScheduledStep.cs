using Rollout.Kernels;

namespace Rollout.Engine;

/// <summary>
/// A step from its planning to its results: what the backend computes, and for which sequences. It fills the <see cref="StepLayout"/> and
/// reads the results back; the scheduler decides which sequences and how many tokens. Allocated once and reused.
/// </summary>
internal sealed class ScheduledStep(StepLayout layout)
{
    private readonly Sequence[] _sequences = new Sequence[layout.RowStart.Length - 1];
    private readonly StepQuery[] _queries = new StepQuery[layout.Queries.Length];

    public StepLayout Layout { get; } = layout;

    /// <summary>In the order of their rows.</summary>
    public ReadOnlySpan<Sequence> Sequences => _sequences.AsSpan(0, Layout.SequenceCount);

    /// <summary>What each query of the layout is for.</summary>
    public ReadOnlySpan<StepQuery> Queries => _queries.AsSpan(0, Layout.QueryCount);

    /// <summary>
    /// Copies to make after the forward pass: a sequence forked from its leader gets its own copy of the last, partial block.
    /// </summary>
    public List<BlockCopy> Copies { get; } = new(layout.RowStart.Length - 1);

    public void Clear()
    {
        Layout.Clear();
        Copies.Clear();
    }

    // ---- Filling.

    /// <summary>Adds rows for the sequence's next tokens; they count as computed from here on.</summary>
    public void AddRows(Sequence sequence, int tokens)
    {
        int s = Layout.SequenceCount++;
        int row = Layout.RowStart[s];
        int position = sequence.Computed;
        _sequences[s] = sequence;
        Layout.RowStart[s + 1] = row + tokens;
        int known = Math.Min(tokens, sequence.Total - position);
        sequence.AllTokens.Slice(position, known).CopyTo(Layout.TokenIds.AsSpan(row));
        if (known < tokens) Layout.TokenIds[row + known] = ~sequence.LastQuery;
        for (int i = 0; i < tokens; i++) Layout.Positions[row + i] = position + i;
        sequence.BlockTable.AsSpan(0, sequence.BlockCount).CopyTo(Layout.BlockTables.AsSpan(s * Layout.MaxBlocks));
        sequence.Computed += tokens;
    }

    /// <summary>The last row of sequence s.</summary>
    public int LastRowOf(int s) => Layout.RowStart[s + 1] - 1;

    /// <summary>Adds queries for the log-probabilities of the prompt at every row of sequence s.</summary>
    public void AddPromptQueries(int s)
    {
        Sequence sequence = _sequences[s];
        int top = sequence.Group.Request.PromptTop;
        for (int row = Layout.RowStart[s]; row < Layout.RowStart[s + 1]; row++)
        {
            int position = Layout.Positions[row];
            // After the last prompt token there is no token to score, only alternatives to list.
            bool last = position == sequence.PromptLength - 1;
            Add(new StepQuery(sequence, position), row, top, new SampleQuery
            {
                Target = last ? 0 : sequence.AllTokens[position + 1],
                Temperature = 1,
                TopP = 1,
            });
        }
    }

    /// <summary>Adds a query for the sequence's next token, from the logits of a row.</summary>
    public void AddSampleQuery(Sequence sequence, int row)
    {
        Group group = sequence.Group;
        GroupRequest request = group.Request;
        LogitBias bias = sequence.Sampled + sequence.InFlight < request.MinTokens ? group.BiasBeforeMinTokens : group.Bias;
        sequence.LastQuery = Layout.QueryCount;
        Add(new StepQuery(sequence, PromptPosition: -1), row, request.TopLogProbs, new SampleQuery
        {
            Target = -1,
            Temperature = request.Temperature,
            TopK = request.TopK,
            TopP = request.TopP,
            MinP = request.MinP,
            Seed = request.Seed,
            SampleIndex = (uint)sequence.Index,
            Position = sequence.Total + sequence.InFlight,
            BiasStart = Layout.AddBiases(bias.Ids, bias.Values),
            BiasCount = bias.Ids.Length,
        });
        sequence.InFlight++;
    }

    private void Add(StepQuery what, int row, int alternatives, SampleQuery query)
    {
        // Queries of one row are consecutive and share its logits.
        if (Layout.OutputCount == 0 || Layout.OutputRows[Layout.OutputCount - 1] != row) Layout.OutputRows[Layout.OutputCount++] = row;
        query.OutputIndex = Layout.OutputCount - 1;
        query.AlternativesStart = Layout.AlternativesCount;
        query.AlternativesCount = alternatives;
        _queries[Layout.QueryCount] = what;
        Layout.Queries[Layout.QueryCount++] = query;
        Layout.AlternativesCount += alternatives;
    }

    // ---- Reading.

    /// <summary>
    /// Stores the result of query q: a sampled token in its sequence, or a prompt position's log-probabilities in its group. Returns the
    /// reason if the sequence ends with it: an error where the logits allow no token.
    /// </summary>
    /// <param name="q">A query of a sequence that has not ended.</param>
    /// <param name="version">Of the weights that the step ran on.</param>
    public FinishReason StoreResult(int q, ulong version)
    {
        (Sequence sequence, int position) = _queries[q];
        ref readonly SampleResult result = ref Layout.Results[q];
        if (position < 0) sequence.InFlight--;
        if (result.Token < 0) return FinishReason.Error;

        ref readonly SampleQuery query = ref Layout.Queries[q];
        ReadOnlySpan<int> topIds = Layout.AlternativeIds.AsSpan(query.AlternativesStart, query.AlternativesCount);
        ReadOnlySpan<float> topLogProbs = Layout.AlternativeLogProbs.AsSpan(query.AlternativesStart, query.AlternativesCount);
        if (position < 0)
        {
            sequence.Append(result, topIds, topLogProbs, version);
            return sequence.EndOfLastToken();
        }

        sequence.Group.StorePromptLogProb(position, result.LogProb, topIds, topLogProbs, version);
        bool complete = position == sequence.PromptLength - 1;
        return complete && sequence.MaxTokens == 0 ? FinishReason.Length : FinishReason.None;
    }
}

/// <summary>What a query is for: the log-probability at a prompt position, or (-1) the sequence's next token.</summary>
internal readonly record struct StepQuery(Sequence Sequence, int PromptPosition)
{
    public bool IsSample => PromptPosition < 0;
}

/// <summary>Copy KV block From to block To; From is -1 where nothing is to be copied.</summary>
internal readonly record struct BlockCopy(int From, int To);
