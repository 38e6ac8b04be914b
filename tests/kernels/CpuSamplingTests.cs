namespace Rollout.Kernels.Tests;

/// <summary>The work that the CPU skips while it draws changes no token.</summary>
public sealed class CpuSamplingTests
{
    [Theory]
    [InlineData(128)]
    [InlineData(256)]
    [InlineData(512)]
    public void The_token_drawn_is_the_one_that_all_the_noise_of_the_row_would_choose(int vectorBits)
    {
        Assert.SkipUnless(CpuBackend.IsAccelerated(vectorBits), $"This machine has no {vectorBits}-bit vectors.");
        using CpuBackend backend = new(1, vectorBits);
        Bench bench = new(backend);
        foreach (int vocabulary in new[] { 5, 64, 130, 1000 })
        {
            foreach (float spread in new[] { 0.01f, 2f, 9f })
            {
                // Random, ascending and descending: the best comes anywhere, late and early. And so large that most scores are equal.
                float[] values = bench.Values(vocabulary, spread);
                float[][] rows = [values, [.. values.Order()], [.. values.OrderDescending()], [.. values.Select(v => v + 3e7f)]];
                foreach (float[] logits in rows)
                {
                    SampleQuery[] queries = [.. Enumerable.Range(0, 40).Select(p => Bench.Query() with { Position = p })];
                    SampleResult[] results = BackendTests.Ask(backend, logits, vocabulary, Bench.Queries(queries));
                    for (int q = 0; q < queries.Length; q++)
                        Assert.Equal(Drawn(logits, queries[q]), results[q].Token);
                }
            }
        }
    }

    /// <summary>A random word with twenty-three ones, found by trying positions: no noise is larger.</summary>
    [Fact]
    public void The_largest_noise_lifts_the_least_token_that_it_can_lift()
    {
        using CpuBackend backend = new(1);
        const int Token = 128;
        SampleQuery query = Bench.Query() with { Position = 264499 };
        float largest = VectorMath.Gumbel(Word(Token, query));
        Assert.Equal(uint.MaxValue >> 9, Word(Token, query) >> 9);
        Assert.InRange(largest, 16.6f, 16.7f);
        for (int first = 0; first < 2; first++)
        {
            // Token 1 or the last has a score just below or just above the other's with noise.
            float[] logits = Enumerable.Repeat(-1000f, 200).ToArray();
            int rival = first == 0 ? 1 : 199;
            foreach ((float gap, bool lifted) in new[] { (0.0005f, true), (0.01f, true), (0.3f, true), (1f, true), (-0.0005f, false) })
            {
                logits[Token] = 0f;
                logits[rival] = largest - gap - VectorMath.Gumbel(Word(rival, query));
                int expected = lifted ? Token : rival;
                Assert.Equal(expected, Drawn(logits, query));
                Assert.Equal(expected, BackendTests.Ask(backend, logits, 200, Bench.Queries(query))[0].Token);
            }
        }
    }

    [Theory]
    [InlineData(2)]
    [InlineData(5)]
    public void Queries_on_several_threads_are_answered_as_on_one(int threads)
    {
        // Every thread copies, divides, truncates and sorts in its own scratch.
        const int Vocabulary = 3001, Rows = 24;
        using CpuBackend one = new(1), several = new(threads);
        float[] logits = new Bench(one).Values(Rows * Vocabulary, 4f);
        SampleQuery[] queries = [.. Enumerable.Range(0, 3 * Rows).Select(q =>
            Bench.Query(q / 3, 0.5f + (q % 3), topK: q % 5 * 100, topP: q % 2 == 0 ? 0.8f : 1f) with
            {
                BiasStart = q % 4,
                BiasCount = q % 3,
                Position = q,
                AlternativesStart = q / 3 * Vocabulary,
                AlternativesCount = q % 3 == 0 ? Vocabulary : 0,
            })];
        (int, float)[] biases = [.. Enumerable.Range(0, 8).Select(i => (i * 311, 2f - i))];
        (SampleResult[] expected, int[] likely) = Answers(one);
        for (int round = 0; round < 20; round++)
        {
            (SampleResult[] results, int[] alternatives) = Answers(several);
            Assert.Equal(expected, results);
            Assert.True(likely.AsSpan().SequenceEqual(alternatives), $"alternatives, round {round}");
        }

        (SampleResult[] Results, int[] Alternatives) Answers(CpuBackend backend)
        {
            StepLayout step = Bench.Queries(queries, biases, Rows * Vocabulary);
            return (BackendTests.Ask(backend, logits, Vocabulary, step), step.AlternativeIds);
        }
    }

    private static int Drawn(float[] x, SampleQuery query)
    {
        int token = -1;
        float best = float.NegativeInfinity;
        for (int v = 0; v < x.Length; v++)
        {
            float score = x[v] + VectorMath.Gumbel(Word(v, query));
            if (score > best)
                (best, token) = (score, v);
        }

        return token;
    }

    private static uint Word(int token, SampleQuery query)
    {
        uint[] key = [(uint)query.Seed, (uint)(query.Seed >> 32)];
        return Sampling.Philox([(uint)token / 4, (uint)query.Position, query.SampleIndex, 0], key)[token % 4];
    }
}
