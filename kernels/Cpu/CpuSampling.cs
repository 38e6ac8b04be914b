using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>
/// Answers sample queries as protos/rollout/v1/DEFINITIONS.md defines them. Units: queries; one thread answers a query from start to end.
/// <para>
/// Sums of exponentials run in fixed chunks of <see cref="Chunk"/> tokens, each in 16 lanes relative to the chunk's own maximum, merged in
/// ascending order. Truncation never sorts the vocabulary: a sixteenth of the row gives an estimate of the border, bisection over the
/// ordered bit patterns of fp32 brackets it in the whole row, and only the tokens left in the bracket are sorted.
/// </para>
/// </summary>
internal abstract unsafe class SampleJob : Job, IDisposable
{
    public const int Chunk = 4096;

    public float* Logits;
    public int Stride;
    public int Vocabulary;
    public StepLayout Step = null!;
    public int FirstOutput;
    public int FirstQuery;

    private NativeBuffer? _scratch;
    private int _capacity;
    private int _workers;

    /// <summary>Allocates each worker's scratch in native memory; only when a vocabulary is larger than any before.</summary>
    public void Reserve(int workers, int vocabulary)
    {
        int capacity = (vocabulary + 63) / 64 * 64;
        if (capacity <= _capacity && workers <= _workers)
            return;
        _scratch?.Dispose();
        _capacity = capacity;
        _workers = workers;
        _scratch = new NativeBuffer((long)workers * capacity * 16);
    }

    public void Dispose() => _scratch?.Dispose();

    /// <summary>Processed logits, padded to a multiple of 64 with negative infinity.</summary>
    protected float* Processed(int worker) => _scratch!.Floats + ((long)worker * _capacity * 4);

    protected float* Masses(int worker) => Processed(worker) + _capacity;

    protected ulong* Candidates(int worker) => (ulong*)(Processed(worker) + (2L * _capacity));
}

internal sealed unsafe partial class SampleJob<TLanes> : SampleJob
    where TLanes : unmanaged, ILanes<TLanes>
{
    /// <summary>Larger than -log(-log(1 - 2^-24)).</summary>
    private const float LargestNoise = 16.7f;

    /// <summary>Greedy below this: the smallest normal number; dividing by less would overflow.</summary>
    private const float SmallestTemperature = 1.17549435e-38f;

    public override void Execute(int unit, int worker)
    {
        int q = FirstQuery + unit;
        ref readonly SampleQuery query = ref Step.Queries[q];
        ref SampleResult result = ref Step.Results[q];
        int row = query.OutputIndex;
        float* logits = Logits + ((long)(row - FirstOutput) * Stride);

        result = SampleResult.Nothing;
        if (!LogSum(logits, Vocabulary, out float max, out float logSum) || float.IsNegativeInfinity(max))
            return;

        if (query.AlternativesCount > 0)
            Alternatives(query, logits, max, logSum, Candidates(worker));

        if (query.Target >= 0)
        {
            result.Token = query.Target;
            result.LogProb = logits[query.Target] - max - logSum;
            result.SamplingLogProb = result.LogProb;
            return;
        }

        int token = Draw(query, logits, max, logSum, worker, out float samplingLogProb);
        if (token < 0)
            return;
        result.Token = token;
        result.LogProb = logits[token] - max - logSum;
        result.SamplingLogProb = samplingLogProb;
    }

    private int Draw(in SampleQuery query, float* logits, float max, float logSum, int worker, out float samplingLogProb)
    {
        samplingLogProb = 0f;
        float* x = logits;
        float* processed = Processed(worker);
        if (query.BiasCount > 0)
        {
            Copy(logits, processed, Vocabulary);
            for (int i = query.BiasStart; i < query.BiasStart + query.BiasCount; i++)
                processed[Step.BiasIds[i]] += Step.BiasValues[i];
            x = processed;
            max = Largest(x, Vocabulary);
        }

        // A temperature so small that the quotient overflows is treated as the limit, greedy.
        if (query.Temperature < SmallestTemperature || !float.IsFinite(max / query.Temperature))
            return float.IsNegativeInfinity(max) ? -1 : IndexOf(x, Vocabulary, max);

        if (query.Temperature != 1f)
        {
            Divide(x, query.Temperature, processed, Vocabulary);
            x = processed;
        }

        bool truncated = (query.TopK > 0 && query.TopK < Vocabulary) || query.TopP < 1f || query.MinP > 0f;
        if (!truncated)
        {
            if (x != logits && !LogSum(x, Vocabulary, out max, out logSum))
                return -1;
        }
        else
        {
            // The sum is over the tokens that truncation keeps.
            if (x == logits)
                Copy(logits, processed, Vocabulary);
            else if (!TryLargest(x, Vocabulary, out max))
                return -1;
            x = processed;
            Truncate(query, x, Vocabulary, max, Masses(worker), Candidates(worker));
            LogSum(x, Vocabulary, out _, out logSum);
        }

        int token = ArgMaxWithNoise(x, Vocabulary, max, query);
        samplingLogProb = token < 0 ? 0f : x[token] - max - logSum;
        return token;
    }

    // ---- Passes over a row. n elements; the last few lanes of a row that is not a multiple of 16 are negative infinity.

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static TLanes Load(float* x, int i, int n) =>
        i + LaneMemory.Count <= n ? TLanes.Load(x + i) : LaneMemory.LoadPartial<TLanes>(x + i, n - i, float.NegativeInfinity);

    /// <summary>max and log(sum(exp(x - max))). False where an element is not a number or positive infinity.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static bool LogSum(float* x, int n, out float max, out float logSum)
    {
        max = float.NegativeInfinity;
        float total = 0f;
        TLanes fine = TLanes.CreateBits(uint.MaxValue);
        for (int start = 0; start < n; start += Chunk)
        {
            int end = Math.Min(n, start + Chunk);
            TLanes largest = TLanes.Create(float.NegativeInfinity);
            for (int i = start; i < end; i += LaneMemory.Count)
            {
                TLanes v = Load(x, i, n);
                largest = TLanes.Max(largest, v);
                fine = TLanes.And(fine, TLanes.Less(v, TLanes.Create(float.PositiveInfinity)));
            }

            if (TLanes.Any(TLanes.Not(fine)))
            {
                logSum = float.NaN;
                return false;
            }

            float chunkMax = TLanes.Largest(largest);
            if (float.IsNegativeInfinity(chunkMax))
                continue;

            TLanes top = TLanes.Create(chunkMax);
            TLanes sums = TLanes.Create(0f);
            for (int i = start; i < end; i += LaneMemory.Count)
                sums += VectorMath.Exp(Load(x, i, n) - top);
            float sum = TLanes.Sum(sums);
            if (chunkMax > max)
            {
                total = MathF.FusedMultiplyAdd(total, VectorMath.Exp(max - chunkMax), sum);
                max = chunkMax;
            }
            else
            {
                total = MathF.FusedMultiplyAdd(sum, VectorMath.Exp(chunkMax - max), total);
            }
        }

        logSum = VectorMath.Log(total);
        return true;
    }

    private static void Copy(float* source, float* destination, int n) =>
        new ReadOnlySpan<float>(source, n).CopyTo(new Span<float>(destination, n));

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static float Largest(float* x, int n)
    {
        TLanes largest = TLanes.Create(float.NegativeInfinity);
        for (int i = 0; i < n; i += LaneMemory.Count)
            largest = TLanes.Max(largest, Load(x, i, n));
        return TLanes.Largest(largest);
    }

    /// <summary>False where an element is not a number or positive infinity.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static bool TryLargest(float* x, int n, out float max)
    {
        TLanes largest = TLanes.Create(float.NegativeInfinity), fine = TLanes.CreateBits(uint.MaxValue);
        for (int i = 0; i < n; i += LaneMemory.Count)
        {
            TLanes v = Load(x, i, n);
            largest = TLanes.Max(largest, v);
            fine = TLanes.And(fine, TLanes.Less(v, TLanes.Create(float.PositiveInfinity)));
        }

        max = TLanes.Largest(largest);
        return !TLanes.Any(TLanes.Not(fine));
    }

    /// <summary>The lowest index of a value.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static int IndexOf(float* x, int n, float value)
    {
        TLanes wanted = TLanes.Create(value);
        for (int i = 0; i < n; i += LaneMemory.Count)
        {
            if (!TLanes.Any(TLanes.GreaterOrEqual(Load(x, i, n), wanted)))
                continue;
            for (int j = i; j < n; j++)
            {
                if (x[j] == value)
                    return j;
            }
        }

        return -1;
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Divide(float* x, float temperature, float* output, int n)
    {
        TLanes divisor = TLanes.Create(temperature);
        int i = 0;
        for (; i + LaneMemory.Count <= n; i += LaneMemory.Count)
            TLanes.Store(output + i, TLanes.Load(x + i) / divisor);
        for (; i < n; i++)
            output[i] = x[i] / temperature;
    }

    // ---- Drawing.

    /// <summary>
    /// arg-max of x + Gumbel noise, the lowest id among equals, -1 where all are negative infinity. Tokens are processed in ascending
    /// order, 64 at a time; where even the largest noise of the 64 could not lift the largest x of the 64 above the best so far, their
    /// logarithms are not computed. Rounded addition is monotone, so this changes no result. There are two such tests: one on the random
    /// words alone, against the word that the row's largest x would need (recomputed only when the best changes), then one on the 64
    /// themselves.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static int ArgMaxWithNoise(float* x, int n, float max, in SampleQuery query)
    {
        // Covers the last bits by which the logarithm may fail to be monotone.
        const float Margin = 1e-4f;

        uint key0 = (uint)query.Seed, key1 = (uint)(query.Seed >> 32);
        float* noise = stackalloc float[64];
        uint* index = stackalloc uint[LaneMemory.Count];
        for (uint j = 0; j < LaneMemory.Count; j++)
            index[j] = j;

        float best = float.NegativeInfinity, leastWord = 0f;
        int token = -1;
        for (int start = 0; start < n; start += 64)
        {
            int end = Math.Min(n, start + 64);
            TLanes largest = Load(x, start, n);
            for (int i = start + LaneMemory.Count; i < end; i += LaneMemory.Count)
                largest = TLanes.Max(largest, Load(x, i, n));
            float top = TLanes.Largest(largest);
            if (float.IsNegativeInfinity(top) || top + LargestNoise < best)
                continue;

            TLanes r0 = TLanes.AddBits(TLanes.Load((float*)index), TLanes.CreateBits((uint)start / 4));
            TLanes r1 = TLanes.CreateBits((uint)query.Position), r2 = TLanes.CreateBits(query.SampleIndex), r3 = TLanes.CreateBits(0);
            Philox.Generate(ref r0, ref r1, ref r2, ref r3, key0, key1);

            // Without their lowest 9 bits the words are fp32 integers, larger as the words are larger.
            TLanes words = TLanes.Max(
                TLanes.Max(TLanes.ToSingle(TLanes.ShiftRight(r0, 9)), TLanes.ToSingle(TLanes.ShiftRight(r1, 9))),
                TLanes.Max(TLanes.ToSingle(TLanes.ShiftRight(r2, 9)), TLanes.ToSingle(TLanes.ShiftRight(r3, 9))));
            float largestWord = TLanes.Largest(words);
            if (largestWord < leastWord || top + (VectorMath.Gumbel((uint)largestWord << 9) + Margin) < best)
                continue;

            TLanes.Store(noise, r0);
            TLanes.Store(noise + 16, r1);
            TLanes.Store(noise + 32, r2);
            TLanes.Store(noise + 48, r3);
            ToNoise(noise);
            for (int i = start; i < end; i++)
            {
                int v = i - start;
                float value = x[i] + noise[((v & 3) * 16) + (v >> 2)];
                if (value > best)
                    (best, token) = (value, i);
            }

            // The word whose noise would lift the largest x to the best, less a slack above the errors of exp and of rounding u.
            const float Slack = 32f;
            float noiseNeeded = best - max - Margin;
            leastWord = (VectorMath.Exp(-VectorMath.Exp(-noiseNeeded)) * (1 << 23)) - Slack;
        }

        return token;
    }

    /// <summary>64 random words to Gumbel noise, in place.</summary>
    [MethodImpl(MethodImplOptions.NoInlining | MethodImplOptions.AggressiveOptimization)]
    private static void ToNoise(float* words)
    {
        for (int i = 0; i < 64; i += LaneMemory.Count)
            TLanes.Store(words + i, VectorMath.Gumbel(TLanes.Load(words + i)));
    }

    /// <summary>The most probable tokens under the model, equals by ascending id.</summary>
    private void Alternatives(in SampleQuery query, float* logits, float max, float logSum, ulong* candidates)
    {
        int wanted = query.AlternativesCount;
        float least = wanted < Vocabulary
            ? FindBorder(logits, null, Vocabulary, max, Vocabulary, wanted, candidates).Value
            : float.NegativeInfinity;
        int found = Gather(logits, Vocabulary, least, float.NaN, candidates);
        new Span<ulong>(candidates, found).Sort();
        for (int i = 0; i < wanted; i++)
        {
            int id = (int)(uint)candidates[i];
            Step.AlternativeIds[query.AlternativesStart + i] = id;
            Step.AlternativeLogProbs[query.AlternativesStart + i] = logits[id] - max - logSum;
        }
    }
}
