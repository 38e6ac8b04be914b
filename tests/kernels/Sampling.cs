namespace Rollout.Kernels.Tests;

/// <summary>protos/rollout/v1/DEFINITIONS.md, rule by rule, in float64.</summary>
public static class Sampling
{
    public static SampleResult Answer(double[] z, SampleQuery query, StepLayout step)
    {
        int[] all = Enumerable.Range(0, z.Length).ToArray();
        double logSum = LogSum(z, all);
        int[] likely = all.OrderByDescending(v => z[v]).ThenBy(v => v).Take(query.AlternativesCount).ToArray();
        for (int i = 0; i < likely.Length; i++)
        {
            step.AlternativeIds[query.AlternativesStart + i] = likely[i];
            step.AlternativeLogProbs[query.AlternativesStart + i] = (float)(z[likely[i]] - logSum);
        }

        if (query.Target >= 0)
        {
            float target = (float)(z[query.Target] - logSum);
            return new SampleResult { Token = query.Target, LogProb = target, SamplingLogProb = target };
        }

        double[] b = (double[])z.Clone();
        for (int i = query.BiasStart; i < query.BiasStart + query.BiasCount; i++)
            b[step.BiasIds[i]] += step.BiasValues[i];
        if (b.All(double.IsNegativeInfinity))
            return SampleResult.Nothing;
        if (query.Temperature == 0f)
        {
            int best = all.MaxBy(v => b[v]);
            return new SampleResult { Token = best, LogProb = (float)(z[best] - logSum) };
        }

        double[] x = b.Select(v => v / query.Temperature).ToArray();
        int[] kept = Kept(x, query);
        int token = kept.OrderByDescending(v => x[v] + Gumbel(v, query)).ThenBy(v => v).First();
        return new SampleResult
        {
            Token = token,
            LogProb = (float)(z[token] - logSum),
            SamplingLogProb = (float)(x[token] - LogSum(x, kept)),
        };
    }

    /// <summary>Tokens that truncation leaves.</summary>
    public static int[] Kept(double[] x, SampleQuery query)
    {
        int[] kept = Enumerable.Range(0, x.Length).OrderByDescending(v => x[v]).ThenBy(v => v).ToArray();
        double max = x.Max();
        if (query.TopK > 0)
            kept = kept.Take(query.TopK).ToArray();
        if (query.TopP < 1f)
        {
            double total = kept.Sum(v => Math.Exp(x[v] - max)), sum = 0;
            int n = 0;
            do
                sum += Math.Exp(x[kept[n++]] - max);
            while (n < kept.Length && sum < query.TopP * total);
            kept = kept.Take(n).ToArray();
        }

        return kept.Where(v => Math.Exp(x[v] - max) >= query.MinP && !double.IsNegativeInfinity(x[v])).ToArray();
    }

    public static double LogSum(double[] x, int[] tokens)
    {
        double max = tokens.Max(v => x[v]);
        return max + Math.Log(tokens.Sum(v => Math.Exp(x[v] - max)));
    }

    public static double Gumbel(int token, SampleQuery query)
    {
        uint[] words = Philox(
            [(uint)token / 4, (uint)query.Position, query.SampleIndex, 0], [(uint)query.Seed, (uint)(query.Seed >> 32)]);
        double u = ((words[token % 4] >> 9) * Math.Pow(2, -23)) + Math.Pow(2, -24);
        return -Math.Log(-Math.Log(u));
    }

    /// <summary>Philox 4x32-10 as the paper writes it.</summary>
    public static uint[] Philox(uint[] counter, uint[] key)
    {
        uint[] c = (uint[])counter.Clone(), k = (uint[])key.Clone();
        for (int round = 0; round < 10; round++)
        {
            ulong p0 = (ulong)c[0] * 0xD2511F53, p1 = (ulong)c[2] * 0xCD9E8D57;
            c = [(uint)(p1 >> 32) ^ c[1] ^ k[0], (uint)p1, (uint)(p0 >> 32) ^ c[3] ^ k[1], (uint)p0];
            k = [k[0] + 0x9E3779B9, k[1] + 0xBB67AE85];
        }

        return c;
    }
}
