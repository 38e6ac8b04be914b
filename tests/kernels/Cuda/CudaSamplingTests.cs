using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Sampling a query with many blocks gives the same result wherever a row is cut, whichever block merges, and however few tokens truncation
/// reads.
/// </summary>
public sealed class CudaSamplingTests : IDisposable
{
    private const int Slice = CudaSampleScratch.SliceTokens;
    private const int Sorted = 4096; // ROOM of logits.cuh: more tokens take another path

    private readonly CudaBackend _backend;
    private readonly Bench _bench;

    public CudaSamplingTests()
    {
        SimulatedDevice.Require();
        _backend = new CudaBackend(0, WeightFormat.Float32);
        _bench = new Bench(_backend, 5);
    }

    public void Dispose() => _backend.Dispose();

    /// <summary>Rows of most vocabularies are not aligned: they are loaded differently from a row on a 16-byte boundary.</summary>
    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(Slice - 1)]
    [InlineData(Slice)]
    [InlineData(Slice + 1)]
    [InlineData(2 * Slice)]
    [InlineData((3 * Slice) + 2)]
    [InlineData(32_003)]
    [InlineData(151_936)]
    public void Vocabularies_around_slices_equal_the_reference(int vocabulary)
    {
        float[] logits = _bench.Values(2 * vocabulary, 6f);
        (int, float)[] biases = [(0, 1f), (vocabulary / 2, float.NegativeInfinity), (vocabulary - 1, 4f)];
        SampleQuery[] queries =
        [
            Bench.Query(0), Bench.Query(0, target: vocabulary - 1), Bench.Query(0, topP: 0.9f),
            Bench.Query(1), Bench.Query(1, 0f), Bench.Query(1, 0.7f) with { BiasCount = vocabulary > 2 ? 3 : 0 }, Bench.Query(1, topK: 50),
            Bench.Query(1, topK: 20, topP: 0.8f, minP: 0.01f) with { BiasCount = vocabulary > 2 ? 3 : 0 }, Bench.Query(1, minP: 0.5f),
        ];
        StepLayout step = Bench.Queries(queries, biases);
        SampleResult[] results = Ask(logits, vocabulary, step);
        for (int q = 0; q < queries.Length; q++)
            BackendTests.CheckAnswer(Row(logits, vocabulary, queries[q].OutputIndex), queries[q], step, results[q]);
    }

    /// <summary>An answer does not depend on other queries of its row or of others, nor on its row's place.</summary>
    [Theory]
    [InlineData((2 * Slice) + 3)]
    [InlineData(Slice - 2)]
    public void A_querys_answer_has_the_same_bits_alone_and_among_any_number_of_others(int vocabulary)
    {
        const int Rows = 5;
        float[] logits = _bench.Values(Rows * vocabulary, 5f);
        (int, float)[] biases = [(Slice - 3, 3f), (Slice - 3, 1f)];
        SampleQuery[] queries =
        [
            .. Enumerable.Range(0, 3 * Rows).Select(q => Bench.Query(
                q / 3, q % 7 / 3f, q % 4 == 1 ? 30 : 0, q % 4 == 2 ? 0.9f : 1f, q % 5 == 4 ? 0.1f : 0f, target: q == 8 ? 77 : -1)
                with { Position = q, BiasCount = q % 3 == 1 ? 2 : 0 }),
        ];
        SampleResult[] all = [.. Ask(logits, vocabulary, Bench.Queries(queries, biases))];
        for (int count = 1; count < queries.Length; count++)
        {
            int rows = queries[count - 1].OutputIndex + 1;
            Assert.Equal(all[..count], Ask(logits[..(rows * vocabulary)], vocabulary, Bench.Queries(queries[..count], biases)));
        }

        for (int q = 0; q < queries.Length; q++)
        {
            float[] row = Row(logits, vocabulary, queries[q].OutputIndex);
            Assert.Equal(all[q], Ask(row, vocabulary, Bench.Queries([queries[q] with { OutputIndex = 0 }], biases))[0]);
        }
    }

    [Fact]
    public void Queries_that_take_turns_are_answered_as_if_each_were_alone()
    {
        const int Vocabulary = 9, Most = CudaSampleScratch.MostQueries;
        float[] logits = _bench.Values(Vocabulary);
        SampleQuery[] queries = [.. Enumerable.Range(0, (2 * Most) + 1).Select(q => Bench.Query() with { Position = q })];
        SampleResult[] all = [.. Ask(logits, Vocabulary, Bench.Queries(queries))];
        foreach (int q in (int[])[0, Most - 1, Most, Most + 1, (2 * Most) - 1, 2 * Most])
            Assert.Equal(all[q], Ask(logits, Vocabulary, Bench.Queries(queries[q]))[0]);
        Assert.True(all.Select(result => result.Token).Distinct().Count() > 3);
    }

    [Theory]
    [InlineData(float.NaN)]
    [InlineData(float.PositiveInfinity)]
    public void A_logit_that_is_no_number_in_any_slice_gives_no_token(float poison)
    {
        const int Vocabulary = (2 * Slice) + 100;
        float[] logits = _bench.Values(2 * Vocabulary);
        SampleQuery[] queries = [Bench.Query(0), Bench.Query(1), Bench.Query(1, topK: 9), Bench.Query(1, 0f), Bench.Query(1, target: 5)];
        SampleResult good = Ask(logits, Vocabulary, Bench.Queries(queries))[0];
        foreach (int token in (int[])[0, Slice - 1, Slice, (2 * Slice) + 99])
        {
            float[] poisoned = [.. logits];
            poisoned[Vocabulary + token] = poison;
            SampleResult[] results = Ask(poisoned, Vocabulary, Bench.Queries(queries));
            Assert.Equal(good, results[0]);
            Assert.All(results[1..], result => Assert.Equal(SampleResult.Nothing, result));
        }
    }

    [Fact]
    public void Of_equals_in_several_slices_the_lowest_id_is_first()
    {
        const int Vocabulary = (3 * Slice) + 5;
        float[] logits = _bench.Values(Vocabulary);
        int[] equals = [Slice - 1, Slice, (2 * Slice) + 7, 3 * Slice];
        foreach (int v in equals)
            logits[v] = 3f;
        SampleQuery alternatives = Bench.Query(temperature: 0f) with { AlternativesCount = 4 };
        for (int first = 0; first < equals.Length; first++)
        {
            StepLayout step = Bench.Queries([alternatives], [], 4);
            Assert.Equal(equals[first], Ask(logits, Vocabulary, step)[0].Token);
            Assert.Equal(equals[first..], step.AlternativeIds[..(equals.Length - first)]);
            logits[equals[first]] = -1f;
        }

        Array.Fill(logits, -0f);
        logits[Slice] = 0f; // no more than -0
        SampleQuery[] queries = [.. Enumerable.Range(0, 8).Select(p => Bench.Query(topK: Slice + 2) with { Position = p })];
        SampleResult[] results = Ask(logits, Vocabulary, Bench.Queries(queries));
        Assert.All(results, result => Assert.InRange(result.Token, 0, Slice + 1));
        Assert.All(results, result => Assert.Equal(-Math.Log(Slice + 2), result.SamplingLogProb, 4));
        results = Ask(logits, Vocabulary, Bench.Queries(Bench.Query(topK: 1), Bench.Query(topP: 0f), Bench.Query(temperature: 0f)));
        Assert.All(results, result => Assert.Equal((0, 0f), (result.Token, result.SamplingLogProb)));
    }

    [Fact]
    public void Slices_without_a_token_that_may_be_drawn_change_nothing()
    {
        const int Vocabulary = (3 * Slice) - 1;
        float[] values = _bench.Values(Vocabulary, 4f);
        SampleQuery[] queries =
        [
            Bench.Query(), Bench.Query(temperature: 0.5f), Bench.Query(topK: 12), Bench.Query(topP: 0.95f), Bench.Query(temperature: 0f),
        ];
        for (int slice = 0; slice < 3; slice++)
        {
            foreach (bool all in (bool[])[false, true])
            {
                float[] logits = [.. values.Select((value, v) => v / Slice == slice == all ? value : float.NegativeInfinity)];
                StepLayout step = Bench.Queries(queries);
                SampleResult[] results = Ask(logits, Vocabulary, step);
                for (int q = 0; q < queries.Length; q++)
                    BackendTests.CheckAnswer(logits, queries[q], step, results[q]);
                Assert.All(results, result => Assert.Equal(all, result.Token / Slice == slice));
            }
        }
    }

    [Fact]
    public void Biases_reach_the_first_and_the_last_token_of_every_slice()
    {
        const int Vocabulary = (2 * Slice) + 6;
        float[] logits = _bench.Values(Vocabulary);
        int[] borders = [0, Slice - 1, Slice, (2 * Slice) - 1, 2 * Slice, Vocabulary - 1];
        foreach (int preferred in borders)
        {
            // The others are forbidden, though the model likes them best.
            float[] liked = [.. logits];
            foreach (int v in borders)
                liked[v] = 8f;
            (int, float)[] biases = [.. borders.Select(v => (v, v == preferred ? 30f : float.NegativeInfinity))];
            SampleQuery[] queries = [Bench.Query(), Bench.Query(temperature: 0f), Bench.Query(topK: 2), Bench.Query(topP: 0.5f)];
            queries = [.. queries.Select(query => query with { BiasCount = borders.Length })];
            StepLayout step = Bench.Queries(queries, biases);
            SampleResult[] results = Ask(liked, Vocabulary, step);
            Assert.All(results, result => Assert.Equal(preferred, result.Token));
            for (int q = 0; q < queries.Length; q++)
                BackendTests.CheckAnswer(liked, queries[q], step, results[q]);
        }
    }

    [Fact]
    public void Forbidding_every_token_of_all_slices_gives_none()
    {
        const int Vocabulary = Slice + 1;
        (int, float)[] biases = [.. Enumerable.Range(0, Vocabulary).Select(v => (v, float.NegativeInfinity))];
        SampleQuery[] queries = [Bench.Query(), Bench.Query(topK: 3), Bench.Query(topP: 0.5f), Bench.Query(temperature: 0f)];
        queries = [.. queries.Select(query => query with { BiasCount = Vocabulary })];
        SampleResult[] results = Ask(_bench.Values(Vocabulary), Vocabulary, Bench.Queries(queries, biases));
        Assert.All(results, result => Assert.Equal(-1, result.Token));
    }

    /// <summary>The last kept token is among the first tokens that are read, among later ones, or in neither.</summary>
    [Theory]
    [InlineData(8f)]
    [InlineData(1f)]
    [InlineData(0.01f)]
    public void Truncation_equals_the_reference_however_many_tokens_it_keeps(float spread)
    {
        const int Vocabulary = (5 * Slice) + 9;
        float[] logits = [.. _bench.Values(Vocabulary, spread)];
        float[] rounded = [.. logits.Select(value => MathF.Round(value * 2f / spread) * spread / 2f)]; // a few thousand times each value
        foreach (float[] row in (float[][])[logits, rounded])
        {
            SampleQuery[] queries =
            [
                Bench.Query(topP: 0.001f), Bench.Query(topP: 0.02f), Bench.Query(topP: 0.1f), Bench.Query(topP: 0.4f),
                Bench.Query(topP: 0.995f), Bench.Query(topK: 1), Bench.Query(topK: 63), Bench.Query(topK: 300),
                Bench.Query(topK: Sorted), Bench.Query(topK: Sorted + 1), Bench.Query(topK: 200, topP: 0.5f),
                Bench.Query(topK: Sorted + 9, topP: 0.5f), Bench.Query(topP: 0.9f, minP: 0.99f),
                Bench.Query(minP: 0.99f), Bench.Query(minP: 1f), Bench.Query(minP: 1e-20f), Bench.Query(temperature: 0.01f, topP: 0.95f),
            ];
            StepLayout step = Bench.Queries(queries);
            SampleResult[] results = Ask(row, Vocabulary, step);
            for (int q = 0; q < queries.Length; q++)
                BackendTests.CheckAnswer(row, queries[q], step, results[q]);
        }
    }

    [Theory]
    [InlineData(1, false)]
    [InlineData(5, false)]
    [InlineData(5, true)]
    [InlineData(900, false)]
    [InlineData(20, true)]
    public void Alternatives_of_a_row_of_several_slices_are_the_most_probable_in_order(int count, bool mostlyForbidden)
    {
        const int Vocabulary = (3 * Slice) + 3;
        float[] logits =
        [
            .. _bench.Values(Vocabulary, 5f)
                .Select((value, v) => mostlyForbidden && v % 700 != 0 ? float.NegativeInfinity : MathF.Round(value, 1)),
        ];
        SampleQuery query = Bench.Query(topK: 4) with { AlternativesCount = count, AlternativesStart = 1 };
        StepLayout step = Bench.Queries([query], [], count + 1);
        Ask(logits, Vocabulary, step);
        int[] ordered = [.. Enumerable.Range(0, Vocabulary).OrderByDescending(v => logits[v]).ThenBy(v => v)];
        Assert.Equal(ordered[..count], step.AlternativeIds[1..]);
        double logSum = Sampling.LogSum([.. logits.Select(v => (double)v)], [.. Enumerable.Range(0, Vocabulary)]);
        for (int i = 0; i < count; i++)
            Assert.Equal(logits[step.AlternativeIds[1 + i]] - logSum, step.AlternativeLogProbs[1 + i], 4);
    }

    /// <summary>
    /// The row is read once, by one of many blocks; truncation and alternatives read only a small part of it again. Logits resemble a
    /// model's, with a few likely tokens and many unlikely ones: 240 tokens have 0.95. Keeping thousands takes several passes over the row.
    /// </summary>
    [Fact]
    public void A_row_is_cut_over_blocks_and_read_once()
    {
        SimulatedDevice.RequireSimulated();
        const int Vocabulary = 151_936;
        Assert.Equal(38, new CudaSampleScratch(Vocabulary).Slices);
        int[] ranks = [.. Enumerable.Range(0, Vocabulary)];
        new Random(3).Shuffle(ranks);
        float[] logits = [.. ranks.Select(rank => 20f - (1.5f * MathF.Log(1f + rank)))];
        (SampleQuery Query, double MostReads)[] cases =
        [
            (Bench.Query(), 1.1), (Bench.Query(temperature: 0.7f), 1.1), (Bench.Query(temperature: 0f), 1.1), (Bench.Query(target: 9), 1.1),
            (Bench.Query() with { AlternativesCount = 5 }, 1.2), (Bench.Query(topK: 50), 1.3), (Bench.Query(topK: 50, topP: 0.95f), 1.3),
            (Bench.Query(minP: 0.05f), 1.3), (Bench.Query(topP: 0.8f), 1.3), (Bench.Query(topP: 0.95f), 1.6),
            (Bench.Query(topP: 0.99f), 10), (Bench.Query(topK: 10_000), 10),
        ];
        _ = Read(Bench.Query()); // allocates memory, and clears it
        foreach ((SampleQuery query, double most) in cases)
            Assert.InRange(Read(query), 1, most);

        // By all threads, in rows.
        double Read(SampleQuery query)
        {
            SimulatedDevice.Counters before = SimulatedDevice.Count();
            Ask(logits, Vocabulary, Bench.Queries([query], [], 5));
            return (SimulatedDevice.Count() - before).ReadBytes / (double)(sizeof(float) * Vocabulary);
        }
    }

    private SampleResult[] Ask(float[] logits, int vocabulary, StepLayout step) => BackendTests.Ask(_backend, logits, vocabulary, step);

    private static float[] Row(float[] logits, int vocabulary, int row) => logits.AsSpan(row * vocabulary, vocabulary).ToArray();
}
