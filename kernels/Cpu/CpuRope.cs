using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>
/// Rotary position embedding (Su et al. 2021, halves paired) of queries in place and of keys on their way into the cache, after an optional
/// RMS norm of every head; values are copied. Keys are stored transposed, [keyDim][16 tokens]. Units: <see cref="RowsPerUnit"/> rows.
/// </summary>
internal abstract unsafe class RopeJob : Job
{
    /// <summary>Neighbouring tokens share the cache lines of their keys, so two threads should not write alternate tokens.</summary>
    public const int RowsPerUnit = 8;

    public float* Qkv;
    public int Stride;
    public int Heads;
    public float* QueryNorm;
    public float* KeyNorm;
    public int QueryNormLength; // of one head, or of all
    public int KeyNormLength;
    public float Epsilon;
    public CpuRopeTable Rope = null!;
    public CpuKvLayer Cache;
    public StepLayout Step = null!;
    public int[] RowSequence = [];
}

internal sealed unsafe class RopeJob<TLanes> : RopeJob
    where TLanes : unmanaged, ILanes<TLanes>
{
    public override void Execute(int unit, int worker)
    {
        int end = Math.Min(Step.RowCount, (unit + 1) * RowsPerUnit);
        for (int row = unit * RowsPerUnit; row < end; row++)
            Row(row);
    }

    private void Row(int row)
    {
        int position = Step.Positions[row];
        int block = Step.BlockTables[(RowSequence[row] * Step.MaxBlocks) + (position / KvCache.BlockTokens)];
        int slot = position % KvCache.BlockTokens;
        int keyDim = Cache.KeyDim, valueDim = Cache.ValueDim;
        float* cos = Rope.Cos(position), sin = Rope.Sin(position);

        float* head = Qkv + ((long)row * Stride);
        NormHeads(head, QueryNorm, QueryNormLength, Heads * keyDim);
        for (int h = 0; h < Heads; h++, head += keyDim)
            Rotate(head, cos, sin, keyDim);

        NormHeads(head, KeyNorm, KeyNormLength, Cache.KvHeads * keyDim);
        for (int h = 0; h < Cache.KvHeads; h++, head += keyDim)
        {
            Rotate(head, cos, sin, keyDim);
            float* keys = Cache.Keys(block, h) + slot;
            for (int d = 0; d < keyDim; d++)
                keys[d * KvCache.BlockTokens] = head[d];
        }

        for (int h = 0; h < Cache.KvHeads; h++, head += valueDim)
        {
            float* values = Cache.Values(block, h) + (slot * Cache.ValueStride);
            new ReadOnlySpan<float>(head, valueDim).CopyTo(new Span<float>(values, valueDim));
        }
    }

    private void NormHeads(float* heads, float* norm, int length, int count)
    {
        if (norm == null)
            return;
        for (int at = 0; at < count; at += length)
            Norm.Row<TLanes>(heads + at, norm, Epsilon, heads + at, length);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Rotate(float* head, float* cos, float* sin, int headDim)
    {
        int half = headDim / 2;
        float* other = head + half;
        int i = 0;
        for (; i + LaneMemory.Count <= half; i += LaneMemory.Count)
        {
            TLanes x = TLanes.Load(head + i), y = TLanes.Load(other + i), c = TLanes.Load(cos + i), s = TLanes.Load(sin + i);
            TLanes.Store(head + i, TLanes.Fma(x, c, TLanes.Create(0f) - (y * s)));
            TLanes.Store(other + i, TLanes.Fma(y, c, x * s));
        }

        for (; i < half; i++)
        {
            float x = head[i], y = other[i];
            head[i] = MathF.FusedMultiplyAdd(x, cos[i], 0f - (y * sin[i]));
            other[i] = MathF.FusedMultiplyAdd(y, cos[i], x * sin[i]);
        }
    }
}
