using CsCheck;

namespace Rollout.Kernels.Tests;

/// <summary>Sampling at the borders: of vectors and chunks, of sort keys, of ties, and between queries.</summary>
public abstract partial class BackendTests
{
    /// <summary>A simulated device runs every thread as a fiber, so it runs fewer and smaller cases.</summary>
    private bool IsSlow => Draws < 20000;

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(15)]
    [InlineData(16)]
    [InlineData(17)]
    [InlineData(33)]
    [InlineData(63)]
    [InlineData(64)]
    [InlineData(65)]
    [InlineData(4095)]
    [InlineData(4096)]
    [InlineData(4097)]
    [InlineData(8191)]
    [InlineData(8192)]
    [InlineData(8193)]
    public void Samples_of_a_vocabulary_at_a_border_equal_the_reference(int vocabulary)
    {
        Assert.SkipWhen(IsSlow && vocabulary is not (1 or 17 or 64 or 4097), "Too many fibers.");
        Bench bench = New(vocabulary);
        Assert.SkipWhen(bench.Backend is ReferenceBackend, "There is nothing to compare it with.");
        float[] plain = bench.Values(vocabulary, 4f);
        float[] lateMaximum = [.. plain.Select((z, v) => z + (v / 4000f))], earlyMaximum = [.. plain.Select((z, v) => z - (v / 4000f))];
        float[] forbidden = [.. plain.Select((z, v) => v < Math.Min(4096, vocabulary / 2) || v % 3 == 1 ? float.NegativeInfinity : z)];
        forbidden[^1] = 1f;
        foreach (float[] logits in new[] { plain, lateMaximum, earlyMaximum, forbidden })
        {
            SampleQuery[] queries =
            [
                Bench.Query(temperature: 0f), Bench.Query(temperature: 0.6f), Bench.Query(topK: vocabulary - 1, topP: 0.6f),
                Bench.Query(topK: 40, topP: 0.9f, minP: 0.02f, temperature: 0.9f), Bench.Query(target: vocabulary - 1),
            ];
            if (vocabulary <= 4097)
            {
                queries =
                [
                    .. queries, Bench.Query(), Bench.Query(topK: 1), Bench.Query(topK: vocabulary), Bench.Query(topK: vocabulary + 1),
                    Bench.Query(topK: (vocabulary / 2) + 1, temperature: 1.5f), Bench.Query(topP: 0.6f), Bench.Query(minP: 0.05f),
                ];
            }

            StepLayout step = Bench.Queries(queries);
            SampleResult[] results = Ask(bench.Backend, logits, vocabulary, step);
            for (int q = 0; q < queries.Length; q++)
                CheckAnswer(logits, queries[q], step, results[q]);
        }
    }

    [Fact]
    public void Every_bit_of_seed_sample_index_and_position_decides_the_draw()
    {
        Bench bench = New();
        const int Vocabulary = 70;
        float[] logits = bench.Values(Vocabulary);
        ulong[] seeds = [0, 1, 1UL << 31, uint.MaxValue, 1UL << 32, 1UL << 63, ulong.MaxValue];
        uint[] indices = [0, 1, 1U << 31, uint.MaxValue];
        int[] positions = [0, 65535, 65536, 131071, 131072, 1 << 30, int.MaxValue];
        SampleQuery[] queries = [.. from seed in seeds from index in indices from position in positions
            select Bench.Query() with { Seed = seed, SampleIndex = index, Position = position }];
        StepLayout step = Bench.Queries(queries);
        SampleResult[] results = Ask(bench.Backend, logits, Vocabulary, step);
        for (int q = 0; q < queries.Length; q++)
            CheckAnswer(logits, queries[q], step, results[q]);
    }

    [Fact]
    public void Every_query_of_a_row_has_its_own_biases_and_alternatives()
    {
        Bench bench = New(3);
        const int Vocabulary = 45;
        float[] logits = bench.Values(2 * Vocabulary, 2f);
        (int, float)[] biases = [(7, 4f), (2, 6f), (9, float.NegativeInfinity), (0, float.NegativeInfinity), (44, 8f), (3, -1f), (3, 9f)];
        SampleQuery[] queries =
        [
            Bench.Query(0) with { BiasStart = 1, BiasCount = 2, AlternativesStart = 4, AlternativesCount = 3 },
            Bench.Query(0),
            Bench.Query(0, target: 2) with { BiasStart = 1, BiasCount = 1, AlternativesStart = 9, AlternativesCount = 2 },
            Bench.Query(0, temperature: 0f) with { BiasStart = 3, BiasCount = 2 },
            Bench.Query(1, temperature: 0.8f, topK: 5) with { BiasStart = 0, BiasCount = 1 },
            Bench.Query(1, topP: 0.7f) with { BiasStart = 5, BiasCount = 1, AlternativesStart = 0, AlternativesCount = 4 },
            Bench.Query(1, minP: 0.1f) with { BiasStart = 6, BiasCount = 1 },
            Bench.Query(1, temperature: 0f),
        ];
        StepLayout step = Bench.Queries(queries, biases, 11);
        SampleResult[] results = Ask(bench.Backend, logits, Vocabulary, step);
        for (int q = 0; q < queries.Length; q++)
        {
            SampleQuery query = queries[q];
            float[] row = Bench.Row(logits, Vocabulary, query.OutputIndex);
            CheckAnswer(row, query, step, results[q]);
            IEnumerable<int> expected =
                Enumerable.Range(0, Vocabulary).OrderByDescending(v => row[v]).ThenBy(v => v).Take(query.AlternativesCount);
            Assert.Equal(expected, step.AlternativeIds.AsSpan(query.AlternativesStart, query.AlternativesCount).ToArray());
        }

        Assert.Equal(44, results[3].Token);
    }

    /// <summary>
    /// As min_tokens does: the token that would be drawn is forbidden, and nothing else changes. The one bias is at the first and last
    /// place of a vector, of the 4096 tokens that a block of a GPU processes, and of the vocabulary.
    /// </summary>
    [Theory]
    [InlineData(45, 0)]
    [InlineData(45, 15)]
    [InlineData(45, 16)]
    [InlineData(45, 44)]
    [InlineData(48, 47)]
    [InlineData(4096, 4095)]
    [InlineData(8192, 4095)]
    [InlineData(8192, 4096)]
    [InlineData(8192, 8191)]
    [InlineData(8195, 8192)]
    [InlineData(8195, 8194)]
    public void Where_the_most_probable_token_is_forbidden_the_next_one_is_taken(int vocabulary, int forbidden)
    {
        Bench bench = New();
        float[] logits = bench.Values(vocabulary);
        (logits[forbidden], logits[20]) = (30f, 20f);
        SampleQuery query = Bench.Query(temperature: 0f) with { BiasCount = 1 };
        SampleQuery[] queries =
        [
            query, query with { Temperature = 1f }, query with { Temperature = 0.5f }, query with { Temperature = 1e-39f },
            query with { Temperature = 1f, TopK = 1 }, query with { Temperature = 1f, TopP = 0.5f },
            query with { Temperature = 1f, MinP = 0.5f },
        ];
        StepLayout step = Bench.Queries(queries, [(forbidden, float.NegativeInfinity)]);
        Assert.All(Ask(bench.Backend, logits, vocabulary, step), result =>
        {
            Assert.Equal(20, result.Token);
            Assert.Equal(-10.0, result.LogProb, 3);
            Assert.Equal(0.0, result.SamplingLogProb, 3);
        });
    }

    /// <summary>Where many logits are equal, exactly the tokens of the rules are kept: their mass shows how many.</summary>
    [Fact]
    public void Truncation_among_equals_equals_the_reference()
    {
        Bench subject = New();
        Gen.Select(Gen.Int[1, 130], Gen.Int[0, 1 << 30]).Sample(
            (vocabulary, seed) =>
            {
                Random random = new(seed);
                float[] logits = [.. Enumerable.Range(0, vocabulary).Select(_ => random.Next(-2, 3) * 0.5f)];
                double[] x = [.. logits.Select(v => (double)v)];
                SampleQuery query = Bench.Query(topK: random.Next(3) == 0 ? 0 : random.Next(1, vocabulary + 3));
                if (random.Next(2) == 0)
                {
                    // Halfway between two tokens' shares, where rounding does not matter.
                    int[] kept = Sampling.Kept(x, query);
                    double total = kept.Sum(v => Math.Exp(x[v]));
                    int last = random.Next(kept.Length);
                    double above = kept.Take(last).Sum(v => Math.Exp(x[v]));
                    query.TopP = (float)((above + (Math.Exp(x[kept[last]]) / 2)) / total);
                }

                query.MinP = random.Next(3) switch { 0 => 0f, 1 => 0.5f, _ => 1f };
                query.Seed = (ulong)seed;
                StepLayout step = Bench.Queries([query, query with { Position = 1 }, query with { Position = 2 }]);
                SampleResult[] results = Ask(subject.Backend, logits, vocabulary, step);
                for (int q = 0; q < 3; q++)
                    CheckAnswer(logits, step.Queries[q], step, results[q]);
            },
            iter: IsSlow ? 20 : 300,
            threads: 1);
    }

    [Theory]
    [InlineData(0.25f, 2)]
    [InlineData(0.125f, 1)]
    [InlineData(0.875f, 7)]
    [InlineData(0.8750001f, 8)]
    public void Top_p_that_is_reached_exactly_keeps_no_token_more(float topP, int kept)
    {
        Bench bench = New();
        float[] logits = [-50f, 1f, 1f, 1f, 1f, 1f, 1f, 1f, 1f];
        SampleQuery[] queries = [.. Enumerable.Range(0, IsSlow ? 15 : 60).Select(p => Bench.Query(topP: topP) with { Position = p })];
        Assert.All(Ask(bench.Backend, logits, logits.Length, Bench.Queries(queries)), r =>
        {
            Assert.InRange(r.Token, 1, kept);
            Assert.Equal(-Math.Log(kept), r.SamplingLogProb, 5);
        });
    }

    [Theory]
    [InlineData(1e-45f)]
    [InlineData(1e-38f)]
    [InlineData(2e-38f)]
    [InlineData(1e-37f)]
    [InlineData(1e-30f)]
    public void A_temperature_next_to_nothing_takes_the_most_probable_token(float temperature)
    {
        Bench bench = New();
        foreach (float shift in IsSlow ? new[] { 0f, -1e9f } : [0f, 90f, -90f, 1e9f, -1e9f])
        {
            float[] logits = [.. bench.Values(37, 3f).Select(v => v + shift)];
            logits[35] = shift + 500f;
            StepLayout step = Bench.Queries(Bench.Query(temperature: temperature), Bench.Query(temperature: 0f));
            SampleResult[] results = Ask(bench.Backend, logits, 37, step);
            Assert.Equal(35, results[0].Token);
            Assert.Equal(0f, results[0].SamplingLogProb);
            Assert.Equal(results[1], results[0]);
        }
    }

    [Theory]
    [InlineData(0)]
    [InlineData(15)]
    [InlineData(4095)]
    [InlineData(4096)]
    [InlineData(8200)]
    [InlineData(9000)]
    public void A_logit_that_is_no_number_is_found_wherever_it_lies(int token)
    {
        Bench bench = New();
        const int Vocabulary = 9001;
        Assert.SkipWhen(IsSlow && token is not (4096 or 9000), "Too many fibers.");
        float[] logits = bench.Values(Vocabulary);
        SampleQuery[] queries =
        [
            Bench.Query(), Bench.Query(temperature: 0f), Bench.Query(temperature: 0.5f), Bench.Query(topK: 5), Bench.Query(topP: 0.5f),
            Bench.Query(target: 3),
        ];
        StepLayout step = Bench.Queries(queries);
        Assert.All(Ask(bench.Backend, logits, Vocabulary, step), r => Assert.InRange(r.Token, 0, Vocabulary - 1));
        foreach (float poison in new[] { float.NaN, -float.NaN, float.PositiveInfinity })
        {
            // The same step, whose earlier answers must not stay.
            logits[token] = poison;
            Assert.All(Ask(bench.Backend, logits, Vocabulary, step), r => Assert.Equal(SampleResult.Nothing, r));
        }
    }

    [Fact]
    public void Negative_infinity_takes_no_part_in_anything()
    {
        Bench bench = New();
        const int Vocabulary = 50;
        float[] logits = Enumerable.Repeat(float.NegativeInfinity, Vocabulary).ToArray();
        SampleQuery[] queries =
        [
            Bench.Query(), Bench.Query(temperature: 0f), Bench.Query(temperature: 2f), Bench.Query(topK: 10), Bench.Query(topP: 0.999f),
            Bench.Query(minP: 1e-9f), Bench.Query(topK: 49, topP: 0.9999f),
        ];
        Assert.All(Ask(bench.Backend, logits, Vocabulary, Bench.Queries(queries)), r => Assert.Equal(SampleResult.Nothing, r));

        SampleQuery inVain = Bench.Query(target: 3);
        Assert.Equal(SampleResult.Nothing, Ask(bench.Backend, logits, Vocabulary, Bench.Queries(inVain))[0]);

        (logits[11], logits[37]) = (1f, 1f);
        for (int position = 0; position < 10; position++)
        {
            queries = [.. queries.Select(query => query with { Position = position })];
            SampleResult[] results = Ask(bench.Backend, logits, Vocabulary, Bench.Queries(queries));
            Assert.All(results, r => Assert.True(r.Token is 11 or 37));
            Assert.All(results, r => Assert.Equal(-Math.Log(2), r.LogProb, 5));
            Assert.All(results.Where((_, q) => q != 1), r => Assert.Equal(-Math.Log(2), r.SamplingLogProb, 5));
            Assert.Equal(11, results[1].Token);
        }

        SampleQuery scored = Bench.Query(target: 12) with { AlternativesCount = 5 };
        StepLayout step = Bench.Queries([scored], [], 5);
        SampleResult score = Ask(bench.Backend, logits, Vocabulary, step)[0];
        Assert.Equal((12, float.NegativeInfinity), (score.Token, score.LogProb));
        Assert.Equal([11, 37, 0, 1, 2], step.AlternativeIds);
        Assert.All(step.AlternativeLogProbs[2..], p => Assert.Equal(float.NegativeInfinity, p));
    }

    [Fact]
    public void Both_zeros_are_equal_whatever_their_sign()
    {
        Bench bench = New();
        foreach (float[] logits in new float[][] { [-1f, -0f, -0f, -2f], [-1f, 0f, -0f, -2f], [-1f, -0f, 0f, -2f], [1f, -0f, 0f, -0f] })
        {
            int first = logits[0] == 1f ? 0 : 1;
            for (int kept = 1; kept <= 3; kept++)
            {
                SampleQuery query = Bench.Query(topK: kept) with { AlternativesCount = kept };
                SampleQuery[] queries = [.. Enumerable.Range(0, IsSlow ? 5 : 20).Select(p => query with { Position = p })];
                StepLayout step = Bench.Queries(queries, [], kept);
                double[] x = [.. logits.Select(v => (double)v)];
                int[] expected = Sampling.Kept(x, query);
                SampleResult[] results = Ask(bench.Backend, logits, 4, step);
                Assert.All(results, r => Assert.Contains(r.Token, expected));
                Assert.All(results, r => Assert.Equal(x[r.Token] - Sampling.LogSum(x, expected), r.SamplingLogProb, 5));
                Assert.Equal(Enumerable.Range(0, 4).OrderByDescending(v => x[v]).ThenBy(v => v).Take(kept), step.AlternativeIds);
            }

            Assert.Equal(first, Ask(bench.Backend, logits, 4, Bench.Queries(Bench.Query(temperature: 0f)))[0].Token);
        }
    }
}
