using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>Truncation: each rule leaves negative infinity where it removed a token.</summary>
internal sealed unsafe partial class SampleJob<TLanes>
{
    /// <summary>Candidates that are sorted rather than bisected further.</summary>
    private const int FewEnough = 512;

    /// <summary>One vector in this many is sampled to guess the border.</summary>
    private const int GuessStride = 16;

    /// <summary>Vocabulary size from which a guess saves more than it costs.</summary>
    private const int WorthAGuess = 8192;

    private static void Truncate(in SampleQuery query, float* x, int n, float max, float* masses, ulong* candidates)
    {
        if (query.TopK > 0 && query.TopK < n)
            KeepAbove(x, n, FindBorder(x, null, n, max, n, query.TopK, candidates));
        if (query.TopP < 1f)
        {
            double total = Exponentials(x, n, max, masses);
            KeepAbove(x, n, FindBorder(x, masses, n, max, total, query.TopP * total, candidates));
        }

        if (query.MinP > 0f)
            KeepLikely(x, n, max, query.MinP);
    }

    /// <summary>The last token kept: those after it in descending order of x, equals by ascending id, are removed.</summary>
    private readonly record struct Border(float Value, int LastId);

    /// <summary>
    /// The token at which the mass (or, without masses, the number) of the tokens down to it first reaches <paramref name="target"/>.
    /// </summary>
    private static Border FindBorder(float* x, float* masses, int n, float max, double total, double target, ulong* candidates)
    {
        // Turns -0 into +0: the key after -0's is +0's, and neither zero would be below that upper bound.
        max += 0f;

        // Invariant: tokens at or above high have less than the target, tokens at or above low reach it.
        int high = Ordered(max) + 1, low = 0, count = 0, countAbove = 0;
        double massAbove = 0;
        bool bracketed = false;
        if (n >= WorthAGuess)
        {
            (int guessedLow, int guessedHigh) = Guess(x, masses, n, max, total - target, (float*)candidates);
            bracketed = guessedHigh < high && Narrow(guessedHigh);
            if (!bracketed)
                bracketed = Narrow(guessedLow);
        }

        for (float step = 1f; !bracketed; step *= 2f)
        {
            float bound = step < 1e30f ? max - step : float.NegativeInfinity;
            if (Ordered(bound) < high)
                bracketed = Narrow(Ordered(bound)) || float.IsNegativeInfinity(bound);
        }

        while (count - countAbove > FewEnough && (long)high - low > 1)
            Narrow((int)(((long)low + high) >> 1));

        int found = Gather(x, n, Unordered(low), Unordered(high), candidates);
        new Span<ulong>(candidates, found).Sort();
        double reached = massAbove;
        for (int i = 0; i < found; i++)
        {
            int id = (int)(uint)candidates[i];
            reached += masses == null ? 1.0 : masses[id];

            // Rounding may leave the target slightly beyond the last candidate.
            if (reached >= target || i == found - 1)
                return new Border(x[id], id);
        }

        return new Border(max, int.MaxValue);

        // Whether the tokens from key on reach the target.
        bool Narrow(int key)
        {
            double mass = MassFrom(x, masses, n, Unordered(key), out int countFrom);
            if (mass >= target || key == Ordered(float.NegativeInfinity))
            {
                (low, count) = (key, countFrom);
                return true;
            }

            (high, massAbove, countAbove) = (key, mass, countFrom);
            return false;
        }
    }

    /// <summary>
    /// Estimates, from one vector in <see cref="GuessStride"/>, where the removed tokens have the mass (or number) <paramref name="tail"/>:
    /// two keys that the border is between more often than not. Mass is counted from below, since the tail consists of many tokens where
    /// the top may consist of one.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static (int Low, int High) Guess(float* x, float* masses, int n, float max, double tail, float* scratch)
    {
        const int Near = 16; // tokens of the sample: a narrower range would be noise
        int sampled = 0;
        float* sampledMasses = scratch + (n / GuessStride) + LaneMemory.Count;
        for (int i = 0; i + LaneMemory.Count <= n; i += GuessStride * LaneMemory.Count, sampled += LaneMemory.Count)
        {
            TLanes.Store(scratch + sampled, TLanes.Load(x + i));
            if (masses != null)
                TLanes.Store(sampledMasses + sampled, TLanes.Load(masses + i));
        }

        if (masses == null)
            sampledMasses = null;

        // The bounds tried on either side, to step back to.
        int* lows = stackalloc int[40], lowCounts = stackalloc int[40], highs = stackalloc int[40], highCounts = stackalloc int[40];
        int lowsFound = 1, highsFound = 1;
        (lows[0], highs[0], highCounts[0]) = (Ordered(float.NegativeInfinity), Ordered(max) + 1, 0);
        double target = MassFrom(scratch, sampledMasses, sampled, float.NegativeInfinity, out lowCounts[0]) - (tail / GuessStride);
        while (lowCounts[lowsFound - 1] - highCounts[highsFound - 1] > Near)
        {
            long middle = ((long)lows[lowsFound - 1] + highs[highsFound - 1]) >> 1;
            if (middle == lows[lowsFound - 1])
                break;
            if (MassFrom(scratch, sampledMasses, sampled, Unordered((int)middle), out int count) >= target)
                (lows[lowsFound], lowCounts[lowsFound++]) = ((int)middle, count);
            else
                (highs[highsFound], highCounts[highsFound++]) = ((int)middle, count);
        }

        int above = lowCounts[lowsFound - 1];
        int spread = Near + (int)(3 * Math.Sqrt(Math.Min(above, sampled - above)));
        int low = lowsFound - 1, high = highsFound - 1;
        while (low > 0 && lowCounts[low] < above + spread)
            low--;
        while (high > 0 && highCounts[high] > above - spread)
            high--;
        return (lows[low], highs[high]);
    }

    /// <summary>Bit patterns of fp32 as integers in the numbers' order; its own inverse.</summary>
    private static int Ordered(float value)
    {
        int bits = BitConverter.SingleToInt32Bits(value);
        return bits >= 0 ? bits : bits ^ int.MaxValue;
    }

    private static float Unordered(int key) => BitConverter.Int32BitsToSingle(key >= 0 ? key : key ^ int.MaxValue);

    /// <summary>Sorts descending by value, then ascending by id; +0 and -0 are equal.</summary>
    private static ulong SortKey(float value, int id) => ((ulong)~((uint)Ordered(value + 0f) ^ 0x80000000u) << 32) | (uint)id;

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static double MassFrom(float* x, float* masses, int n, float bound, out int count)
    {
        TLanes least = TLanes.Create(bound), zero = TLanes.Create(0f), one = TLanes.Create(1f);
        TLanes counts = zero, sums = zero;
        int i = 0;
        for (; i + LaneMemory.Count <= n; i += LaneMemory.Count)
        {
            TLanes kept = TLanes.GreaterOrEqual(TLanes.Load(x + i), least);
            counts += TLanes.And(kept, one);
            if (masses != null)
                sums += TLanes.And(kept, TLanes.Load(masses + i));
        }

        double mass = TLanes.Sum(sums);
        count = (int)TLanes.Sum(counts);
        for (; i < n; i++)
        {
            if (x[i] >= bound)
            {
                count++;
                mass += masses == null ? 0f : masses[i];
            }
        }

        return masses == null ? count : mass;
    }

    /// <summary>Sort keys of the elements in [low, high).</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static int Gather(float* x, int n, float low, float high, ulong* candidates)
    {
        TLanes least = TLanes.Create(low), bound = TLanes.Create(high);
        int found = 0;
        for (int i = 0; i < n; i += LaneMemory.Count)
        {
            // The upper bound one above infinity is NaN, which bounds nothing.
            TLanes v = Load(x, i, n);
            if (!TLanes.Any(TLanes.And(TLanes.GreaterOrEqual(v, least), TLanes.Not(TLanes.GreaterOrEqual(v, bound)))))
                continue;
            int end = Math.Min(n, i + LaneMemory.Count);
            for (int j = i; j < end; j++)
            {
                if (x[j] >= low && !(x[j] >= high))
                    candidates[found++] = SortKey(x[j], j);
            }
        }

        return found;
    }

    /// <summary>exp(x - max) into masses, and their sum.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static double Exponentials(float* x, int n, float max, float* masses)
    {
        TLanes top = TLanes.Create(max);
        int i = 0;
        TLanes sums = TLanes.Create(0f);
        for (; i + LaneMemory.Count <= n; i += LaneMemory.Count)
        {
            TLanes mass = VectorMath.Exp(TLanes.Load(x + i) - top);
            TLanes.Store(masses + i, mass);
            sums += mass;
        }

        double total = TLanes.Sum(sums);
        for (; i < n; i++)
        {
            masses[i] = VectorMath.Exp(x[i] - max);
            total += masses[i];
        }

        return total;
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void KeepAbove(float* x, int n, Border border)
    {
        TLanes value = TLanes.Create(border.Value), none = TLanes.Create(float.NegativeInfinity);
        int i = 0;
        for (; i + LaneMemory.Count <= n; i += LaneMemory.Count)
        {
            TLanes v = TLanes.Load(x + i);
            TLanes.Store(x + i, TLanes.Select(TLanes.Less(v, value), none, v));
        }

        for (; i < n; i++)
            x[i] = x[i] < border.Value ? float.NegativeInfinity : x[i];

        // Equals beyond the last one kept are rare: find them by vectors, remove them one by one.
        for (i = Math.Max(0, (border.LastId == int.MaxValue ? n : border.LastId + 1) & -LaneMemory.Count); i < n; i += LaneMemory.Count)
        {
            TLanes v = Load(x, i, n);
            if (!TLanes.Any(TLanes.And(TLanes.GreaterOrEqual(v, value), TLanes.GreaterOrEqual(value, v))))
                continue;
            int end = Math.Min(n, i + LaneMemory.Count);
            for (int j = i; j < end; j++)
            {
                if (j > border.LastId && x[j] == border.Value)
                    x[j] = float.NegativeInfinity;
            }
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void KeepLikely(float* x, int n, float max, float share)
    {
        TLanes top = TLanes.Create(max), least = TLanes.Create(share), none = TLanes.Create(float.NegativeInfinity);
        int i = 0;
        for (; i + LaneMemory.Count <= n; i += LaneMemory.Count)
        {
            TLanes v = TLanes.Load(x + i);
            TLanes.Store(x + i, TLanes.Select(TLanes.Less(VectorMath.Exp(v - top), least), none, v));
        }

        for (; i < n; i++)
            x[i] = VectorMath.Exp(x[i] - max) < share ? float.NegativeInfinity : x[i];
    }
}
