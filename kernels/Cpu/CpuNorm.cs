using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>output[row] = input[row] / sqrt(mean(input[row]²) + epsilon) * scale (Zhang and Sennrich 2019). Units: rows.</summary>
internal abstract unsafe class NormJob : Job
{
    public float* Input;
    public int InputStride;
    public float* Scale;
    public float Epsilon;
    public float* Output;
    public int OutputStride;
    public int Columns;
}

internal sealed unsafe class NormJob<TLanes> : NormJob
    where TLanes : unmanaged, ILanes<TLanes>
{
    public override void Execute(int unit, int worker) =>
        Norm.Row<TLanes>(Input + ((long)unit * InputStride), Scale, Epsilon, Output + ((long)unit * OutputStride), Columns);
}

/// <summary>
/// output[row] += input[row] / sqrt(mean(input[row]²) + epsilon) * scale. Units: rows. The input is overwritten with what is added.
/// </summary>
internal sealed unsafe class NormAddJob<TLanes> : NormJob
    where TLanes : unmanaged, ILanes<TLanes>
{
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public override void Execute(int unit, int worker)
    {
        float* input = Input + ((long)unit * InputStride);
        float* output = Output + ((long)unit * OutputStride);
        Norm.Row<TLanes>(input, Scale, Epsilon, input, Columns);
        int i = 0;
        for (; i + LaneMemory.Count <= Columns; i += LaneMemory.Count)
            TLanes.Store(output + i, TLanes.Load(output + i) + TLanes.Load(input + i));
        for (; i < Columns; i++)
            output[i] += input[i];
    }
}

/// <summary>output[row, i] = silu(gateUp[row, i]) * gateUp[row, width + i]. Units: rows.</summary>
internal abstract unsafe class GatedSiluJob : Job
{
    public float* Input;
    public int InputStride;
    public float* Output;
    public int OutputStride;
    public int Width;
}

internal sealed unsafe class GatedSiluJob<TLanes> : GatedSiluJob
    where TLanes : unmanaged, ILanes<TLanes>
{
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public override void Execute(int unit, int worker)
    {
        float* gate = Input + ((long)unit * InputStride);
        float* up = gate + Width;
        float* output = Output + ((long)unit * OutputStride);
        int i = 0;
        for (; i + LaneMemory.Count <= Width; i += LaneMemory.Count)
            TLanes.Store(output + i, Silu(TLanes.Load(gate + i), TLanes.Load(up + i)));
        if (i < Width)
        {
            int rest = Width - i;
            TLanes last = Silu(LaneMemory.LoadPartial<TLanes>(gate + i, rest, 0f), LaneMemory.LoadPartial<TLanes>(up + i, rest, 0f));
            LaneMemory.StorePartial(output + i, last, rest);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static TLanes Silu(TLanes gate, TLanes up)
    {
        TLanes one = TLanes.Create(1f);
        return gate / (one + VectorMath.Exp(TLanes.Create(0f) - gate)) * up;
    }
}

internal static unsafe class Norm
{
    /// <summary>
    /// One RMS norm over <paramref name="count"/> elements; input and output may be the same. The sum of squares runs in 16 lanes over
    /// ascending elements and is folded once, so its bits do not depend on the vector width.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Row<TLanes>(float* input, float* scale, float epsilon, float* output, int count)
        where TLanes : unmanaged, ILanes<TLanes>
    {
        TLanes sum = TLanes.Create(0f);
        int i = 0;
        for (; i + LaneMemory.Count <= count; i += LaneMemory.Count)
        {
            TLanes x = TLanes.Load(input + i);
            sum = TLanes.Fma(x, x, sum);
        }

        if (i < count)
        {
            TLanes x = LaneMemory.LoadPartial<TLanes>(input + i, count - i, 0f);
            sum = TLanes.Fma(x, x, sum);
        }

        float inverse = 1f / MathF.Sqrt((TLanes.Sum(sum) / count) + epsilon);
        TLanes factor = TLanes.Create(inverse);
        for (i = 0; i + LaneMemory.Count <= count; i += LaneMemory.Count)
            TLanes.Store(output + i, TLanes.Load(input + i) * factor * TLanes.Load(scale + i));
        for (; i < count; i++)
            output[i] = input[i] * inverse * scale[i];
    }
}
