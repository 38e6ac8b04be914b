using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace Rollout.Kernels;

/// <summary>Sixteen lanes in four 128-bit registers: the portable path, hardware or software vectors alike.</summary>
internal readonly unsafe struct Lanes128(Vector128<float> a, Vector128<float> b, Vector128<float> c, Vector128<float> d) : ILanes<Lanes128>
{
    public readonly Vector128<float> A = a;
    public readonly Vector128<float> B = b;
    public readonly Vector128<float> C = c;
    public readonly Vector128<float> D = d;

    public static int Queries => 2;

    public static int Columns => 1;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Lanes128 Same(Vector128<float> v) => new(v, v, v, v);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Create(float value) => Same(Vector128.Create(value));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 CreateBits(uint value) => Same(Vector128.Create(value).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Load(float* source) =>
        new(Vector128.Load(source), Vector128.Load(source + 4), Vector128.Load(source + 8), Vector128.Load(source + 12));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(float* destination, Lanes128 value)
    {
        value.A.Store(destination);
        value.B.Store(destination + 4);
        value.C.Store(destination + 8);
        value.D.Store(destination + 12);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator +(Lanes128 a, Lanes128 b) => new(a.A + b.A, a.B + b.B, a.C + b.C, a.D + b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator -(Lanes128 a, Lanes128 b) => new(a.A - b.A, a.B - b.B, a.C - b.C, a.D - b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator *(Lanes128 a, Lanes128 b) => new(a.A * b.A, a.B * b.B, a.C * b.C, a.D * b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 operator /(Lanes128 a, Lanes128 b) => new(a.A / b.A, a.B / b.B, a.C / b.C, a.D / b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Fma(Lanes128 a, Lanes128 b, Lanes128 c) =>
        new(
            Vector128.FusedMultiplyAdd(a.A, b.A, c.A),
            Vector128.FusedMultiplyAdd(a.B, b.B, c.B),
            Vector128.FusedMultiplyAdd(a.C, b.C, c.C),
            Vector128.FusedMultiplyAdd(a.D, b.D, c.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Max(Lanes128 a, Lanes128 b) =>
        new(
            Vector128.MaxNative(a.A, b.A),
            Vector128.MaxNative(a.B, b.B),
            Vector128.MaxNative(a.C, b.C),
            Vector128.MaxNative(a.D, b.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Less(Lanes128 a, Lanes128 b) =>
        new(
            Vector128.LessThan(a.A, b.A),
            Vector128.LessThan(a.B, b.B),
            Vector128.LessThan(a.C, b.C),
            Vector128.LessThan(a.D, b.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 GreaterOrEqual(Lanes128 a, Lanes128 b) =>
        new(
            Vector128.GreaterThanOrEqual(a.A, b.A),
            Vector128.GreaterThanOrEqual(a.B, b.B),
            Vector128.GreaterThanOrEqual(a.C, b.C),
            Vector128.GreaterThanOrEqual(a.D, b.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Select(Lanes128 mask, Lanes128 a, Lanes128 b) =>
        new(
            Vector128.ConditionalSelect(mask.A, a.A, b.A),
            Vector128.ConditionalSelect(mask.B, a.B, b.B),
            Vector128.ConditionalSelect(mask.C, a.C, b.C),
            Vector128.ConditionalSelect(mask.D, a.D, b.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 And(Lanes128 a, Lanes128 b) => new(a.A & b.A, a.B & b.B, a.C & b.C, a.D & b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Or(Lanes128 a, Lanes128 b) => new(a.A | b.A, a.B | b.B, a.C | b.C, a.D | b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Xor(Lanes128 a, Lanes128 b) => new(a.A ^ b.A, a.B ^ b.B, a.C ^ b.C, a.D ^ b.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Not(Lanes128 a) => new(~a.A, ~a.B, ~a.C, ~a.D);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 AddBits(Lanes128 a, Lanes128 b) =>
        new(
            (a.A.AsUInt32() + b.A.AsUInt32()).AsSingle(),
            (a.B.AsUInt32() + b.B.AsUInt32()).AsSingle(),
            (a.C.AsUInt32() + b.C.AsUInt32()).AsSingle(),
            (a.D.AsUInt32() + b.D.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 SubtractBits(Lanes128 a, Lanes128 b) =>
        new(
            (a.A.AsUInt32() - b.A.AsUInt32()).AsSingle(),
            (a.B.AsUInt32() - b.B.AsUInt32()).AsSingle(),
            (a.C.AsUInt32() - b.C.AsUInt32()).AsSingle(),
            (a.D.AsUInt32() - b.D.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftLeft(Lanes128 a, int count) =>
        new(
            (a.A.AsUInt32() << count).AsSingle(),
            (a.B.AsUInt32() << count).AsSingle(),
            (a.C.AsUInt32() << count).AsSingle(),
            (a.D.AsUInt32() << count).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ShiftRight(Lanes128 a, int count) =>
        new(
            (a.A.AsUInt32() >>> count).AsSingle(),
            (a.B.AsUInt32() >>> count).AsSingle(),
            (a.C.AsUInt32() >>> count).AsSingle(),
            (a.D.AsUInt32() >>> count).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 ToSingle(Lanes128 a) =>
        new(
            Vector128.ConvertToSingle(a.A.AsInt32()),
            Vector128.ConvertToSingle(a.B.AsInt32()),
            Vector128.ConvertToSingle(a.C.AsInt32()),
            Vector128.ConvertToSingle(a.D.AsInt32()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 Scale(Lanes128 a, Lanes128 n) => VectorMath.ScaleInTwo(a, n);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 MultiplyHigh(Lanes128 a, Lanes128 b) =>
        new(
            UpperHalves(a.A.AsUInt32(), b.A.AsUInt32()).AsSingle(),
            UpperHalves(a.B.AsUInt32(), b.B.AsUInt32()).AsSingle(),
            UpperHalves(a.C.AsUInt32(), b.C.AsUInt32()).AsSingle(),
            UpperHalves(a.D.AsUInt32(), b.D.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Lanes128 MultiplyLow(Lanes128 a, Lanes128 b) =>
        new(
            (a.A.AsUInt32() * b.A.AsUInt32()).AsSingle(),
            (a.B.AsUInt32() * b.B.AsUInt32()).AsSingle(),
            (a.C.AsUInt32() * b.C.AsUInt32()).AsSingle(),
            (a.D.AsUInt32() * b.D.AsUInt32()).AsSingle());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector128<uint> UpperHalves(Vector128<uint> x, Vector128<uint> y)
    {
        if (!Sse2.IsSupported)
        {
            return Vector128.Create(
                (uint)(((ulong)x[0] * y[0]) >> 32),
                (uint)(((ulong)x[1] * y[1]) >> 32),
                (uint)(((ulong)x[2] * y[2]) >> 32),
                (uint)(((ulong)x[3] * y[3]) >> 32));
        }

        Vector128<ulong> even = Sse2.Multiply(x, y) >>> 32;
        Vector128<ulong> odd = Sse2.Multiply((x.AsUInt64() >>> 32).AsUInt32(), (y.AsUInt64() >>> 32).AsUInt32());
        return Vector128.ConditionalSelect(Vector128.Create(0xFFFFFFFFul), even, odd).AsUInt32();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Any(Lanes128 mask) => (mask.A | mask.B | mask.C | mask.D).AsUInt32().ExtractMostSignificantBits() != 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Sum(Lanes128 a) => Fold((a.A + a.C) + (a.B + a.D));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Largest(Lanes128 a) =>
        FoldLargest(Vector128.MaxNative(Vector128.MaxNative(a.A, a.C), Vector128.MaxNative(a.B, a.D)));

    /// <summary>Eight lanes to one: halves folded onto each other.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Fold(Vector256<float> v) => Fold(v.GetLower() + v.GetUpper());

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Fold(Vector128<float> v) => (v[0] + v[2]) + (v[1] + v[3]);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float FoldLargest(Vector256<float> v) => FoldLargest(Vector128.MaxNative(v.GetLower(), v.GetUpper()));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float FoldLargest(Vector128<float> v)
    {
        v = Vector128.MaxNative(v, Vector128.Shuffle(v, Vector128.Create(2, 3, 0, 1)));
        v = Vector128.MaxNative(v, Vector128.Shuffle(v, Vector128.Create(1, 0, 3, 2)));
        return v[0];
    }
}
