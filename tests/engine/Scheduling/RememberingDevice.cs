using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>
/// A device without arithmetic: every KV slot stores a hash of everything it was computed from, read through the block table as attention
/// would. The token drawn from a row and every log-probability are derived from that hash, so that wrong keys and values give wrong
/// results, as on a real device.
/// </summary>
internal sealed class RememberingDevice(int blocks)
{
    public const int Vocabulary = 97;

    private readonly Slot[] _slots = new Slot[blocks * KvCache.BlockTokens];
    private int[] _answers = [];

    /// <summary>Prompt tokens computed, with repetitions.</summary>
    public long PromptRows { get; private set; }

    private readonly record struct Slot(ulong Past, int Token, int Position, ulong Version, string Salt);

    /// <summary>Computes a planned step. <see cref="Answers.WriteTo"/> writes its results.</summary>
    /// <param name="step">The plan.</param>
    /// <param name="version">Of the weights.</param>
    /// <param name="mayMix">Whether a sample may have keys and values of other weights.</param>
    public Answers Run(ScheduledStep step, ulong version, Func<Sequence, bool> mayMix)
    {
        StepLayout layout = step.Layout;
        int[] tokens = [.. layout.TokenIds.Take(layout.RowCount).Select(token => token >= 0 ? token : Math.Max(0, _answers[~token]))];
        ulong[] pasts = new ulong[layout.RowCount];
        HashSet<int> written = [];
        for (int s = 0; s < layout.SequenceCount; s++)
        {
            ReadOnlySpan<int> table = layout.BlockTables.AsSpan(s * layout.MaxBlocks, layout.MaxBlocks);
            string salt = step.Sequences[s].Group.Request.CacheSalt;
            for (int row = layout.RowStart[s]; row < layout.RowStart[s + 1]; row++)
            {
                int position = layout.Positions[row];
                Assert.True(written.Add(At(table, position)), "two rows of one step write one slot");
                ulong before = position == 0 ? 0 : _slots[At(table, position - 1)].Past;
                pasts[row] = Past(before, tokens[row], version);
                _slots[At(table, position)] = new Slot(pasts[row], tokens[row], position, version, salt);
                if (position < step.Sequences[s].PromptLength) PromptRows++;
            }
        }

        for (int s = 0; s < layout.SequenceCount; s++)
        {
            Sequence sequence = step.Sequences[s];
            int last = layout.Positions[layout.RowStart[s + 1] - 1];
            CheckPast(sequence, layout.BlockTables.AsSpan(s * layout.MaxBlocks, layout.MaxBlocks), last, version, mayMix(sequence));
        }

        foreach (BlockCopy copy in step.Copies)
            Array.Copy(_slots, copy.From * KvCache.BlockTokens, _slots, copy.To * KvCache.BlockTokens, KvCache.BlockTokens);

        Answers answers = new(layout.QueryCount);
        _answers = new int[layout.QueryCount];
        for (int q = 0; q < layout.QueryCount; q++)
        {
            SampleQuery query = layout.Queries[q];
            int row = layout.OutputRows[query.OutputIndex];
            if (query.Target < 0) Assert.Equal(query.Position - 1, layout.Positions[row]);
            HashSet<int> forbidden = [];
            for (int i = query.BiasStart; i < query.BiasStart + query.BiasCount; i++)
                if (float.IsNegativeInfinity(layout.BiasValues[i])) forbidden.Add(layout.BiasIds[i]);
            answers.Results[q] = Answer(pasts[row], query, forbidden);
            answers.Alternatives[q] = [.. Enumerable.Range(0, query.AlternativesCount).Select(k => Alternative(pasts[row], k))];
            _answers[q] = answers.Results[q].Token;
        }

        return answers;
    }

    /// <summary>Drops all keys and values, as sleep does.</summary>
    public void Forget() => Array.Clear(_slots);

    /// <summary>The past of a row: of the tokens up to it, computed under these weights.</summary>
    public static ulong Past(ulong before, int token, ulong version) => Mix(Mix(before, (ulong)token), version);

    /// <summary>The past of the last of these tokens, all computed under one version.</summary>
    public static ulong Past(IEnumerable<int> tokens, ulong version) => tokens.Aggregate(0ul, (past, token) => Past(past, token, version));

    public static bool IsFinite(ulong past) => Mix(past, 1) % 1000 != 0;

    public static SampleResult Answer(ulong past, in SampleQuery query, IReadOnlySet<int> forbidden)
    {
        if (!IsFinite(past)) return SampleResult.Nothing;
        int token = query.Target;
        ulong noise = Mix(Mix(Mix(past, query.Seed), query.SampleIndex), (ulong)query.Position);
        if (token < 0) for (token = (int)(noise % Vocabulary); forbidden.Contains(token);) token = (token + 1) % Vocabulary;
        return new SampleResult
        {
            Token = token,
            LogProb = Number(Mix(past, (ulong)token)),
            SamplingLogProb = Number(Mix(noise, (ulong)token)),
        };
    }

    public static (int Id, float LogProb) Alternative(ulong past, int k)
        => ((int)(Mix(past, 77 + (ulong)k) % Vocabulary), Number(Mix(past, 99 + (ulong)k)));

    /// <summary>Every row up to the last finds its own past in the blocks, computed under the weights the sample says.</summary>
    private void CheckPast(Sequence sequence, ReadOnlySpan<int> table, int last, ulong version, bool mayMix)
    {
        ulong past = 0;
        ulong oldest = version;
        for (int position = 0; position <= last; position++)
        {
            Slot slot = _slots[At(table, position)];
            past = Past(past, slot.Token, slot.Version);
            Assert.Equal((past, position), (slot.Past, slot.Position));
            if (position < sequence.Total) Assert.Equal(sequence.AllTokens[position], slot.Token);
            Assert.Equal(sequence.Group.Request.CacheSalt, slot.Salt);
            oldest = Math.Min(oldest, slot.Version);
        }

        Assert.Equal(oldest, sequence.OldestKvVersion);
        Assert.True(mayMix || oldest == version, $"keys and values of version {oldest} are read under version {version}");
    }

    private static int At(ReadOnlySpan<int> blockTable, int position)
        => blockTable[position / KvCache.BlockTokens] * KvCache.BlockTokens + position % KvCache.BlockTokens;

    private static float Number(ulong hash) => (hash % 100_000) / -1000f;

    private static ulong Mix(ulong a, ulong b)
    {
        a = (a ^ (b + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9;
        a = (a ^ (a >> 29)) * 0x94D049BB133111EB;
        return a ^ (a >> 32);
    }

    /// <summary>The results of a step, kept until the scheduler collects them.</summary>
    internal sealed class Answers(int queries)
    {
        public SampleResult[] Results { get; } = new SampleResult[queries];

        public (int Id, float LogProb)[][] Alternatives { get; } = new (int, float)[queries][];

        public void WriteTo(StepLayout layout)
        {
            for (int q = 0; q < Results.Length; q++)
            {
                layout.Results[q] = Results[q];
                for (int k = 0; k < Alternatives[q].Length; k++)
                {
                    int at = layout.Queries[q].AlternativesStart + k;
                    (layout.AlternativeIds[at], layout.AlternativeLogProbs[at]) = Alternatives[q][k];
                }
            }
        }
    }
}
