using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// Sampling at the borders of its rules: equal tokens around a cut, more of them than are sorted, the extremes of the noise, of the
/// counters that it is computed from, and of the biases. And several rules at once.
/// </summary>
public sealed class CudaSamplingBorderTests : IDisposable
{
    private const int Slice = CudaSampleScratch.SliceTokens;
    private const int Sorted = 4096; // ROOM of logits.cuh: more tokens take another path

    private readonly CudaBackend _backend;
    private readonly Bench _bench;

    public CudaSamplingBorderTests()
    {
        SimulatedDevice.Require();
        _backend = new CudaBackend(0, WeightFormat.Float32);
        _bench = new Bench(_backend, 9);
    }

    public void Dispose() => _backend.Dispose();

    /// <summary>
    /// Alternatives are the model's own, also with a scored token, a temperature, truncation and biases that reverse the order.
    /// </summary>
    [Theory]
    [InlineData(301, 7)]
    [InlineData((2 * Slice) + 5, 20)]
    public void Alternatives_are_the_models_whatever_is_sampled_beside_them(int vocabulary, int count)
    {
        float[] logits = [.. _bench.Values(2 * vocabulary, 5f).Select(value => MathF.Round(value, 1))];
        int[][] ordered =
        [
            .. Enumerable.Range(0, 2).Select(row =>
                Enumerable.Range(0, vocabulary).OrderByDescending(v => logits[(row * vocabulary) + v]).ThenBy(v => v).ToArray()),
        ];
        (int Id, float Value)[] biases =
        [
            .. Enumerable.Range(0, vocabulary).Where(v => v / 130 % 2 == 0 || v == ordered[1][0])
                .Select(v => (v, v == ordered[1][0] || v % 3 == 0 ? float.NegativeInfinity : v % 50 == 0 ? 9f : -3f)),
        ];
        SampleQuery[] queries =
        [
            Bench.Query(0, target: ordered[0][^1]), Bench.Query(0, 0.5f), Bench.Query(0, 3f, topP: 0.9f), Bench.Query(1, 0f),
            Bench.Query(1, 0f) with { BiasCount = biases.Length }, Bench.Query(1, 0.7f, topK: 5) with { BiasCount = biases.Length },
            Bench.Query(1, 1f, minP: 0.2f) with { BiasCount = biases.Length }, Bench.Query(1, 1f) with { BiasCount = biases.Length },
            Bench.Query(1, target: 0),
        ];
        int all = 0;
        for (int q = 0; q < queries.Length; q++)
        {
            if (q == 3)
                continue; // one among them has none
            (queries[q].AlternativesStart, queries[q].AlternativesCount) = (all, count + q);
            all += count + q;
        }

        StepLayout step = Bench.Queries(queries, biases, all);
        Ask(logits, vocabulary, step);
        foreach (SampleQuery query in queries)
        {
            double[] row = [.. Row(logits, vocabulary, query.OutputIndex).Select(v => (double)v)];
            double logSum = Sampling.LogSum(row, [.. Enumerable.Range(0, vocabulary)]);
            for (int i = 0; i < query.AlternativesCount; i++)
            {
                int token = ordered[query.OutputIndex][i];
                Assert.Equal(token, step.AlternativeIds[query.AlternativesStart + i]);
                Assert.Equal(row[token] - logSum, step.AlternativeLogProbs[query.AlternativesStart + i], 4);
            }
        }
    }

    /// <summary>
    /// The largest and the smallest random numbers: the noise is finite, so a token never wins or loses regardless of the likelihoods.
    /// </summary>
    [Theory]
    [InlineData(1099521435351ul, 0xFFFFFFu)]
    [InlineData(1099512177302ul, 0u)]
    public void The_largest_and_the_smallest_noise_decide_as_the_definition_says(ulong seed, uint upper)
    {
        Assert.Equal(upper, Sampling.Philox([0, 0, 0, 0], [(uint)seed, (uint)(seed >> 32)])[0] >> 8);
        HashSet<int> drawn = [];
        for (int difference = -40; difference <= 40; difference++)
        {
            float[] logits = [difference * 0.75f, 0f, -0.5f];
            SampleQuery plain = Bench.Query() with { Seed = seed }, truncated = Bench.Query(minP: 1e-30f) with { Seed = seed };
            StepLayout step = Bench.Queries(plain, truncated);
            foreach (SampleResult result in Ask(logits, 3, step))
            {
                BackendTests.CheckAnswer(logits, plain, step, result);
                drawn.Add(result.Token == 0 ? 0 : 1);
            }
        }

        Assert.Equal(2, drawn.Count);
    }

    /// <summary>
    /// Equal logits: noise alone decides. Seeds of 64 bits, samples of 32, and positions to the end of the longest context.
    /// </summary>
    [Fact]
    public void The_noise_is_of_the_whole_seed_sample_and_position()
    {
        const int Vocabulary = 259;
        float[] logits = new float[Vocabulary];
        List<SampleQuery> queries = [];
        foreach (ulong seed in (ulong[])[0, 1, 1ul << 31, 1ul << 32, 1ul << 63, ulong.MaxValue])
        {
            foreach (uint sample in (uint[])[0, 255, 256, 65_536, uint.MaxValue])
            {
                foreach (int position in (int[])[0, 65_535, 65_536, 131_071])
                {
                    SampleQuery query = Bench.Query(topK: queries.Count % 2 * (Vocabulary - 1));
                    queries.Add(query with { Seed = seed, SampleIndex = sample, Position = position });
                }
            }
        }

        StepLayout step = Bench.Queries([.. queries]);
        SampleResult[] results = Ask(logits, Vocabulary, step);
        for (int q = 0; q < queries.Count; q++)
            BackendTests.CheckAnswer(logits, queries[q], step, results[q]);
    }

    /// <summary>As many equal tokens as are sorted, and one less or more; also with others above and below them.</summary>
    [Theory]
    [InlineData(8)]
    [InlineData(Sorted - 1)]
    [InlineData(Sorted)]
    [InlineData(Sorted + 1)]
    [InlineData((2 * Sorted) + 102)]
    public void Of_equal_tokens_around_a_cut_as_many_are_kept_as_the_rule_says(int equals)
    {
        const int Above = 3, Below = 200;
        int vocabulary = equals + Above + Below;
        foreach (bool alone in (bool[])[true, false])
        {
            // Those above and below are among the equals.
            float[] logits =
            [
                .. alone ? new float[equals]
                    : Enumerable.Range(0, vocabulary)
                            .Select(v => v % 2 == 1 && v < 2 * Above ? 0.25f : v % 2 == 1 && v < 2 * Below ? -0.25f : 0f),
            ];
            int tokens = logits.Length, first = logits.Count(value => value > 0), same = logits.Count(value => value == 0);
            SampleQuery[] queries =
            [
                Bench.Query(topP: 0.5f), Bench.Query(topP: 0.25f), Bench.Query(minP: 1f), Bench.Query(topP: 0.5f, minP: 1f),
                Bench.Query(topK: 1), Bench.Query(topK: first + same), Bench.Query(topK: first + same - 1),
                Bench.Query(topK: first + same + 1),
                Bench.Query(topK: tokens - 1), Bench.Query(topK: tokens), Bench.Query(topK: tokens + 1),
                Bench.Query(topK: (tokens / 2) + 1, topP: 0.5f),
                Bench.Query(topK: Sorted), Bench.Query(topK: Sorted + 1), Bench.Query(topP: 0f), Bench.Query(0, 2f, topP: 0.5f),
                Bench.Query(temperature: 0f),
            ];
            StepLayout step = Bench.Queries(queries);
            SampleResult[] results = Ask(logits, tokens, step);
            for (int q = 0; q < queries.Length; q++)
                BackendTests.CheckAnswer(logits, queries[q], step, results[q]);
        }
    }

    /// <summary>Several biases for one token add up, each query has its own, and forbidden tokens do not count for truncation.</summary>
    [Theory]
    [InlineData(61)]
    [InlineData((2 * Slice) + 7)]
    public void Biases_of_one_token_add_up_and_are_their_querys_own(int vocabulary)
    {
        float[] logits = _bench.Values(vocabulary, 1f);
        (int, float)[] biases =
        [
            (3, 2f), (3, 2f), (3, 2f), (vocabulary - 1, 3f), (vocabulary - 1, 3f), // of the first
            (0, 5f), (0, float.NegativeInfinity), (0, 5f), (vocabulary - 2, 2.5f), (vocabulary - 1, 2.5f), // of the second
            .. Enumerable.Range(0, vocabulary - 5).Select(v => (v, float.NegativeInfinity)), // of the third
            (vocabulary / 2, 7f),
        ];
        (int Start, int Count)[] ranges = [(0, 5), (5, 5), (10, vocabulary - 5), (biases.Length - 1, 1), (2, 1), (0, 0)];
        SampleQuery[] kinds =
            [Bench.Query(), Bench.Query(0, 0.5f), Bench.Query(0, 0f), Bench.Query(topK: 5), Bench.Query(topP: 0.7f, minP: 0.01f)];
        SampleQuery[] queries =
        [
            .. ranges.SelectMany(range => kinds.Select(query => query with { BiasStart = range.Start, BiasCount = range.Count })),
        ];
        StepLayout step = Bench.Queries(queries, biases);
        SampleResult[] results = Ask(logits, vocabulary, step);
        for (int q = 0; q < queries.Length; q++)
            BackendTests.CheckAnswer(logits, queries[q], step, results[q]);
    }

    private SampleResult[] Ask(float[] logits, int vocabulary, StepLayout step) => BackendTests.Ask(_backend, logits, vocabulary, step);

    private static float[] Row(float[] logits, int vocabulary, int row) => logits.AsSpan(row * vocabulary, vocabulary).ToArray();
}
