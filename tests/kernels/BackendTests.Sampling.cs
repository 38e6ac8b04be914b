using CsCheck;

namespace Rollout.Kernels.Tests;

public abstract partial class BackendTests
{
    internal static SampleResult[] Ask(Backend backend, float[] logits, int vocabulary, StepLayout step)
    {
        using Tensor tensor = backend.AllocateTensor(logits.Length / vocabulary, vocabulary);
        tensor.Write(tensor.Rows, logits);
        backend.BeginStep(step);
        backend.Sample(tensor, 0, step.OutputCount);
        backend.FinishStep(step);
        return step.Results[..step.QueryCount];
    }

    /// <summary>
    /// The token and its log-probabilities; the noise of float32 and of float64 may give different tokens only where scores almost tie.
    /// </summary>
    internal static void CheckAnswer(float[] logits, SampleQuery query, StepLayout step, SampleResult actual)
    {
        double[] z = logits.Select(v => (double)v).ToArray();
        StepLayout scratch = new(1, 1, 1, 1, step.AlternativeIds.Length, step.BiasIds.Length);
        SampleResult expected = Sampling.Answer(z, query, scratch.With(step));
        if (actual.Token != expected.Token)
        {
            double[] x = (double[])z.Clone();
            for (int i = query.BiasStart; i < query.BiasStart + query.BiasCount; i++)
                x[step.BiasIds[i]] += step.BiasValues[i];
            x = x.Select(v => v / query.Temperature).ToArray();
            double Score(int v) => x[v] + Sampling.Gumbel(v, query);
            Assert.Contains(actual.Token, Sampling.Kept(x, query));
            Assert.InRange(Score(expected.Token) - Score(actual.Token), 0, 1e-5 * (1 + Math.Abs(x[actual.Token])));
            return;
        }

        Assert.InRange(Math.Abs(expected.LogProb - actual.LogProb), 0, 2e-5);
        Assert.InRange(Math.Abs(expected.SamplingLogProb - actual.SamplingLogProb), 0, 2e-5 * (1 + (1 / Math.Max(query.Temperature, 0.1))));
    }

    [Fact]
    public void Samples_equal_the_reference()
    {
        Bench subject = New();
        Gen.Select(Gen.Int[1, 300], Gen.Float[0.1f, 12f], Gen.Int[0, 1 << 30]).Sample(
            (vocabulary, spread, seed) =>
            {
                Random random = new(seed);
                Bench bench = new(subject.Backend, seed);
                float[] logits = bench.Values(vocabulary, spread);
                (int Id, float)[] biases = [(random.Next(vocabulary), 2f), (random.Next(vocabulary), float.NegativeInfinity)];
                Array.Sort(biases, (a, b) => a.Id - b.Id);
                SampleQuery query = Bench.Query(
                    temperature: random.Next(3) == 0 ? 1f : 0.3f + (float)random.NextDouble(),
                    topK: random.Next(2) == 0 ? 0 : random.Next(1, vocabulary + 5),
                    topP: random.Next(2) == 0 ? 1f : 0.05f + (0.9f * (float)random.NextDouble()),
                    minP: random.Next(2) == 0 ? 0f : 0.3f * (float)random.NextDouble());
                query.Seed = (ulong)random.NextInt64();
                query.SampleIndex = (uint)random.Next();
                query.Position = random.Next(100000);
                query.BiasCount = vocabulary > 3 && random.Next(2) == 0 ? 2 : 0;
                StepLayout step = Bench.Queries([query], biases);
                CheckAnswer(logits, query, step, Ask(subject.Backend, logits, vocabulary, step)[0]);
            },
            iter: 300,
            threads: 1);
    }

    [Fact]
    public void Samples_of_a_large_vocabulary_equal_the_reference()
    {
        Bench bench = New();
        const int Vocabulary = 20001;
        float[] logits = bench.Values(Vocabulary, 4f);
        SampleQuery[] queries =
        [
            Bench.Query(), Bench.Query(temperature: 0.7f), Bench.Query(topK: 50), Bench.Query(topK: 9000), Bench.Query(topP: 0.9f),
            Bench.Query(topP: 0.3f, temperature: 1.3f), Bench.Query(minP: 0.1f), Bench.Query(topK: 3000, topP: 0.5f, minP: 0.2f),
            Bench.Query(temperature: 0f), Bench.Query(target: 777),
        ];
        StepLayout step = Bench.Queries(queries);
        SampleResult[] results = Ask(bench.Backend, logits, Vocabulary, step);
        for (int q = 0; q < queries.Length; q++)
            CheckAnswer(logits, queries[q], step, results[q]);
    }

    /// <summary>
    /// A backend may estimate a row from a part of it; where that part differs from the rest, the kept tokens must still be those of the
    /// rules.
    /// </summary>
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void Truncation_equals_the_reference_where_a_part_of_the_row_is_unlike_the_rest(int kind)
    {
        Bench bench = New(kind);
        const int Vocabulary = 20001;
        float[] logits = bench.Values(Vocabulary, 3f);
        for (int v = 0; v < Vocabulary; v++)
        {
            bool sixteenth = v / 16 % 16 == 0;
            logits[v] = kind switch
            {
                0 => logits[v] + (sixteenth ? 9f : 0f),
                1 => logits[v] - (sixteenth ? 30f : 0f),
                2 => sixteenth ? 1f : MathF.Round(logits[v]),
                _ => v % 3000 == 5 ? 12f - (v / 3000) : sixteenth ? float.NegativeInfinity : logits[v] - 40f,
            };
        }

        SampleQuery[] queries =
        [
            Bench.Query(topP: 0.02f), Bench.Query(topP: 0.5f), Bench.Query(topP: 0.97f), Bench.Query(topP: 0.9f, temperature: 0.4f),
            Bench.Query(topK: 1), Bench.Query(topK: 600), Bench.Query(topK: 19000), Bench.Query(topK: 5000, topP: 0.8f),
        ];
        StepLayout step = Bench.Queries(queries);
        SampleResult[] results = Ask(bench.Backend, logits, Vocabulary, step);
        for (int q = 0; q < queries.Length; q++)
            CheckAnswer(logits, queries[q], step, results[q]);
    }

    [Fact]
    public void Samples_do_not_depend_on_the_batch()
    {
        Bench bench = New();
        const int Rows = 70, Vocabulary = 333;
        float[] logits = bench.Values(Rows * Vocabulary, 5f);
        SampleQuery[] queries = Enumerable.Range(0, Rows)
            .Select(r => Bench.Query(r, 0.5f + (r % 3), topK: r % 4 * 10, topP: r % 5 == 0 ? 0.7f : 1f, target: r % 11 == 0 ? 3 : -1))
            .ToArray();
        SampleResult[] whole = Ask(bench.Backend, logits, Vocabulary, Bench.Queries(queries)).ToArray();
        for (int rows = 1; rows <= Rows; rows++)
        {
            SampleResult[] some = Ask(bench.Backend, logits[..(rows * Vocabulary)], Vocabulary, Bench.Queries(queries[..rows]));
            Assert.Equal(whole[..rows], some);
        }
    }

    [Fact]
    public void Queries_are_answered_piece_by_piece()
    {
        Bench bench = New();
        const int Vocabulary = 50;
        float[] logits = bench.Values(5 * Vocabulary);
        SampleQuery[] queries =
        [
            Bench.Query(0), Bench.Query(0, target: 4), Bench.Query(1), Bench.Query(3), Bench.Query(3, 2f), Bench.Query(4),
        ];
        SampleResult[] whole = Ask(bench.Backend, logits, Vocabulary, Bench.Queries(queries)).ToArray();
        StepLayout step = Bench.Queries(queries);
        bench.Backend.BeginStep(step);
        for (int first = 0; first < 5; first += 2)
        {
            int count = Math.Min(2, 5 - first);
            bench.Backend.Sample(bench.Tensor(Vocabulary, logits.AsSpan(first * Vocabulary, count * Vocabulary).ToArray()), first, count);
        }

        bench.Backend.FinishStep(step);
        Assert.Equal(whole, step.Results);
    }

    [Fact]
    public void Temperature_one_without_more_gives_the_models_log_probability_bit_for_bit()
    {
        Bench bench = New();
        float[] logits = bench.Values(1000, 8f);
        SampleQuery[] queries = Enumerable.Range(0, 50).Select(p => Bench.Query() with { Position = p }).ToArray();
        Assert.All(
            Ask(bench.Backend, logits, 1000, Bench.Queries(queries)),
            r => Assert.Equal(BitConverter.SingleToInt32Bits(r.LogProb), BitConverter.SingleToInt32Bits(r.SamplingLogProb)));
    }

    [Fact]
    public void Scoring_and_sampling_agree_bit_for_bit()
    {
        Bench bench = New();
        float[] logits = bench.Values(500, 4f);
        SampleResult drawn = Ask(bench.Backend, logits, 500, Bench.Queries(Bench.Query(temperature: 0.6f, topK: 20)))[0];
        SampleResult scored = Ask(bench.Backend, logits, 500, Bench.Queries(Bench.Query(target: drawn.Token)))[0];
        Assert.Equal(drawn.LogProb, scored.LogProb);
        Assert.Equal(scored.LogProb, scored.SamplingLogProb);
    }

    [Fact]
    public void Greedy_takes_the_lowest_of_equals_and_says_zero()
    {
        Bench bench = New();
        float[] logits = new float[70];
        (logits[19], logits[33], logits[69]) = (2f, 2f, 2f);
        SampleResult result = Ask(bench.Backend, logits, 70, Bench.Queries(Bench.Query(temperature: 0f)))[0];
        Assert.Equal(19, result.Token);
        Assert.Equal(0f, result.SamplingLogProb);
        Assert.Equal(2 - Math.Log(67 + (3 * Math.Exp(2))), result.LogProb, 5);
    }

    [Fact]
    public void Bias_changes_the_draw_and_not_the_models_log_probability()
    {
        Bench bench = New();
        float[] logits = [0f, 1f, 2f, 3f];
        SampleQuery query = Bench.Query(temperature: 0f) with { BiasCount = 2 };
        StepLayout step = Bench.Queries([query], [(0, 10f), (3, float.NegativeInfinity)]);
        SampleResult result = Ask(bench.Backend, logits, 4, step)[0];
        Assert.Equal(0, result.Token);
        Assert.Equal(-Math.Log(1 + Math.E + Math.Exp(2) + Math.Exp(3)), result.LogProb, 5);

        query.Temperature = 2f;
        for (int position = 0; position < 50; position++)
        {
            query.Position = position;
            step = Bench.Queries([query], [(0, 1f), (3, float.NegativeInfinity)]);
            result = Ask(bench.Backend, logits, 4, step)[0];
            Assert.NotEqual(3, result.Token);
            double[] x = [0.5, 0.5, 1];
            Assert.Equal(x[result.Token] - Math.Log(x.Sum(Math.Exp)), result.SamplingLogProb, 5);
        }
    }

    [Theory]
    [InlineData(1, 1f, 0f, new[] { 2 })]
    [InlineData(2, 1f, 0f, new[] { 1, 2 })]
    [InlineData(3, 1f, 0f, new[] { 0, 1, 2 })]
    [InlineData(9, 1f, 0f, new[] { 0, 1, 2, 3, 4 })]
    [InlineData(0, 0.39f, 0f, new[] { 2 })]
    [InlineData(0, 0.41f, 0f, new[] { 1, 2 })]
    [InlineData(0, 0.59f, 0f, new[] { 1, 2 })]
    [InlineData(0, 0.61f, 0f, new[] { 0, 1, 2 })]
    [InlineData(0, 0.85f, 0f, new[] { 0, 1, 2, 3 })]
    [InlineData(0, 0f, 0f, new[] { 2 })]
    [InlineData(3, 0.74f, 0f, new[] { 1, 2 })]
    [InlineData(3, 0.76f, 0f, new[] { 0, 1, 2 })]
    [InlineData(0, 1f, 0.49f, new[] { 0, 1, 2, 3 })]
    [InlineData(0, 1f, 0.51f, new[] { 2 })]
    [InlineData(0, 1f, 0.2f, new[] { 0, 1, 2, 3, 4 })]
    [InlineData(0, 1f, 1f, new[] { 2 })]
    public void Truncation_keeps_what_the_rules_say(int topK, float topP, float minP, int[] kept)
    {
        // Probabilities 0.2 0.2 0.4 0.2 and a fifth of 0.1, renormalised: the mass of the first four is 10/11.
        double[] shares = [0.2, 0.2, 0.4, 0.2, 0.1];
        if (topP < 1f)
            shares[4] = 1e-6;
        if (topK == 2 || (topP < 1f && topP > 0.4f && topP < 0.6f) || (topK == 3 && topP < 0.75f))
            shares[1] += 1e-5;
        Bench bench = New();
        float[] logits = shares.Select(p => (float)Math.Log(p)).ToArray();
        SampleQuery[] queries = Enumerable.Range(0, Math.Min(300, Draws / 10))
            .Select(p => Bench.Query(0, 1f, topK, topP, minP) with { Position = p })
            .ToArray();
        SampleResult[] results = Ask(bench.Backend, logits, 5, Bench.Queries(queries));
        Assert.Equal(kept.Where(v => shares[v] > 0.01), results.Select(r => r.Token).Distinct().Order().Where(v => shares[v] > 0.01));
        double total = kept.Sum(v => shares[v]);
        Assert.All(results, r => Assert.Equal(Math.Log(shares[r.Token] / total), r.SamplingLogProb, 4));
        Assert.All(results, r => Assert.Equal(Math.Log(shares[r.Token] / shares.Sum()), r.LogProb, 4));
    }

    [Fact]
    public void Top_k_breaks_ties_by_lower_id()
    {
        Bench bench = New();
        float[] logits = new float[2000];
        SampleQuery[] queries = Enumerable.Range(0, 200).Select(p => Bench.Query(topK: 3) with { Position = p }).ToArray();
        SampleResult[] results = Ask(bench.Backend, logits, 2000, Bench.Queries(queries));
        Assert.Equal([0, 1, 2], results.Select(r => r.Token).Distinct().Order());
        Assert.All(results, r => Assert.Equal(-Math.Log(3), r.SamplingLogProb, 5));

        queries = Enumerable.Range(0, 200).Select(p => Bench.Query(topP: 0.00199f) with { Position = p }).ToArray();
        results = Ask(bench.Backend, logits, 2000, Bench.Queries(queries));
        Assert.Equal([0, 1, 2, 3], results.Select(r => r.Token).Distinct().Order());
    }

    [Theory]
    [InlineData(1)]
    [InlineData(5)]
    [InlineData(700)]
    [InlineData(1500)]
    public void Alternatives_are_the_most_probable_tokens_in_order(int count)
    {
        Bench bench = New();
        const int Vocabulary = 1500;
        float[] logits = bench.Values(Vocabulary, 3f).Select(v => MathF.Round(v, 2)).ToArray();
        SampleQuery query = Bench.Query() with { AlternativesCount = count, AlternativesStart = 2 };
        StepLayout step = Bench.Queries([query], [], count + 2);
        Ask(bench.Backend, logits, Vocabulary, step);
        int[] expected = Enumerable.Range(0, Vocabulary).OrderByDescending(v => logits[v]).ThenBy(v => v).Take(count).ToArray();
        Assert.Equal(expected, step.AlternativeIds[2..]);
        double logSum = Sampling.LogSum(logits.Select(v => (double)v).ToArray(), Enumerable.Range(0, Vocabulary).ToArray());
        for (int i = 0; i < count; i++)
            Assert.Equal(logits[expected[i]] - logSum, step.AlternativeLogProbs[2 + i], 4);
        Assert.Equal(0, step.AlternativeIds[0]);
    }

    [Theory]
    [InlineData(1f, 0, 1f, 0f)]
    [InlineData(0.5f, 0, 1f, 0f)]
    [InlineData(1.5f, 6, 1f, 0f)]
    [InlineData(1f, 0, 0.8f, 0f)]
    [InlineData(1f, 7, 0.9f, 0.1f)]
    public void Draws_are_distributed_as_the_softmax(float temperature, int topK, float topP, float minP)
    {
        Bench bench = New(11);
        const int Vocabulary = 10;
        float[] logits = bench.Values(Vocabulary, 1.5f);
        SampleQuery[] queries = Enumerable.Range(0, Draws)
            .Select(i => Bench.Query(0, temperature, topK, topP, minP) with { Position = i / 4, SampleIndex = (uint)(i % 4), Seed = 99 })
            .ToArray();
        SampleResult[] results = Ask(bench.Backend, logits, Vocabulary, Bench.Queries(queries));

        double[] x = logits.Select(v => (double)v / temperature).ToArray();
        int[] kept = Sampling.Kept(x, queries[0]);
        double logSum = Sampling.LogSum(x, kept), chiSquare = 0;
        foreach (int v in kept)
        {
            double expected = Draws * Math.Exp(x[v] - logSum);
            chiSquare += Math.Pow(results.Count(r => r.Token == v) - expected, 2) / expected;
        }

        Assert.All(results, r => Assert.Contains(r.Token, kept));

        // Five standard deviations above the mean of the chi-square distribution; the draws are fixed, so it fails always or never.
        int freedom = kept.Length - 1;
        Assert.InRange(chiSquare, 0, freedom + (5 * Math.Sqrt(2 * freedom)) + 5);
    }

    [Theory]
    [InlineData(float.NaN, 7)]
    [InlineData(float.PositiveInfinity, 69)]
    [InlineData(float.NaN, 0)]
    public void Logits_that_are_no_numbers_give_no_token_and_disturb_no_other_row(float poison, int token)
    {
        Bench bench = New();
        const int Vocabulary = 70;
        float[] logits = bench.Values(6 * Vocabulary);
        SampleQuery[] queries = Enumerable.Range(0, 6).Select(r => Bench.Query(r)).ToArray();
        SampleResult[] good = Ask(bench.Backend, logits, Vocabulary, Bench.Queries(queries));
        logits[(4 * Vocabulary) + token] = poison;
        SampleResult[] results = Ask(bench.Backend, logits, Vocabulary, Bench.Queries(queries));
        Assert.Equal(-1, results[4].Token);
        foreach (int row in (int[])[0, 1, 2, 3, 5]) Assert.Equal(good[row], results[row]);
    }

    [Fact]
    public void Forbidding_every_token_gives_none()
    {
        Bench bench = New();
        SampleQuery query = Bench.Query() with { BiasCount = 2 };
        StepLayout step = Bench.Queries([query], [(0, float.NegativeInfinity), (1, float.NegativeInfinity)]);
        Assert.Equal(-1, Ask(bench.Backend, [1f, 2f], 2, step)[0].Token);
    }
}

internal static class StepLayoutExtensions
{
    /// <summary>A copy of the biases of another step.</summary>
    public static StepLayout With(this StepLayout step, StepLayout biases)
    {
        biases.BiasIds.CopyTo(step.BiasIds, 0);
        biases.BiasValues.CopyTo(step.BiasValues, 0);
        return step;
    }
}
