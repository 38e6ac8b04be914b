using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>
/// Exponential, logarithm, sine and cosine made of IEEE additions, multiplications and fused multiply-adds only, so that the same bits come
/// from every CPU, vector width and C library. Reductions and polynomials after Moshier's Cephes (expf, logf) and Sun's fdlibm (k_sin,
/// k_cos); errors below 1.5 ulp over the ranges that the tests cover.
/// </summary>
internal static class VectorMath
{
    /// <summary>e^x. exp(0) is exactly 1, exp(-infinity) is 0, not-a-number stays one.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static TLanes Exp<TLanes>(TLanes x)
        where TLanes : unmanaged, ILanes<TLanes>
    {
        // Clamped by selection, not by min and max, so that not-a-number passes through.
        x = TLanes.Select(TLanes.Less(x, TLanes.Create(-104f)), TLanes.Create(-104f), x);
        x = TLanes.Select(TLanes.Less(TLanes.Create(89f), x), TLanes.Create(89f), x);

        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        TLanes magic = TLanes.Create(12582912f);
        TLanes shifted = TLanes.Fma(x, TLanes.Create(1.44269504f), magic);
        TLanes n = shifted - magic;
        TLanes r = TLanes.Fma(n, TLanes.Create(-0.693359375f), x);
        r = TLanes.Fma(n, TLanes.Create(2.12194440e-4f), r);

        TLanes p = TLanes.Create(1.9875691500e-4f);
        p = TLanes.Fma(p, r, TLanes.Create(1.3981999507e-3f));
        p = TLanes.Fma(p, r, TLanes.Create(8.3334519073e-3f));
        p = TLanes.Fma(p, r, TLanes.Create(4.1665795894e-2f));
        p = TLanes.Fma(p, r, TLanes.Create(1.6666665459e-1f));
        p = TLanes.Fma(p, r, TLanes.Create(5.0000001201e-1f));
        p = TLanes.Fma(p * r, r, r) + TLanes.Create(1f);

        return TLanes.Scale(p, n);
    }

    /// <summary>a * 2^n in two factors, so that results below the normal range are rounded once and not flushed.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static TLanes ScaleInTwo<TLanes>(TLanes a, TLanes n)
        where TLanes : unmanaged, ILanes<TLanes>
    {
        TLanes magic = TLanes.Create(12582912f);
        TLanes bits = TLanes.SubtractBits(n + magic, magic);
        TLanes half = TLanes.SubtractBits(
            TLanes.ShiftRight(TLanes.AddBits(bits, TLanes.CreateBits(256)), 1), TLanes.CreateBits(128));
        TLanes rest = TLanes.SubtractBits(bits, half);
        TLanes bias = TLanes.CreateBits(127);
        return a * TLanes.ShiftLeft(TLanes.AddBits(half, bias), 23) * TLanes.ShiftLeft(TLanes.AddBits(rest, bias), 23);
    }

    /// <summary>Natural logarithm of a positive normal number.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static TLanes Log<TLanes>(TLanes x)
        where TLanes : unmanaged, ILanes<TLanes>
    {
        // x = 2^e * m with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) puts the exponent's border there.
        TLanes offset = TLanes.SubtractBits(x, TLanes.CreateBits(0x3F3504F3));
        // An arithmetic shift by 23, from a logical one: add a bias to make it positive, shift, subtract the bias.
        TLanes e = TLanes.ToSingle(
            TLanes.SubtractBits(
                TLanes.ShiftRight(TLanes.AddBits(offset, TLanes.CreateBits(0x80000000)), 23), TLanes.CreateBits(0x100)));
        TLanes m = TLanes.AddBits(TLanes.And(offset, TLanes.CreateBits(0x007FFFFF)), TLanes.CreateBits(0x3F3504F3));

        TLanes f = m - TLanes.Create(1f);
        TLanes z = f * f;
        TLanes p = TLanes.Create(7.0376836292e-2f);
        p = TLanes.Fma(p, f, TLanes.Create(-1.1514610310e-1f));
        p = TLanes.Fma(p, f, TLanes.Create(1.1676998740e-1f));
        p = TLanes.Fma(p, f, TLanes.Create(-1.2420140846e-1f));
        p = TLanes.Fma(p, f, TLanes.Create(1.4249322787e-1f));
        p = TLanes.Fma(p, f, TLanes.Create(-1.6668057665e-1f));
        p = TLanes.Fma(p, f, TLanes.Create(2.0000714765e-1f));
        p = TLanes.Fma(p, f, TLanes.Create(-2.4999993993e-1f));
        p = TLanes.Fma(p, f, TLanes.Create(3.3333331174e-1f));
        TLanes y = p * f * z;
        y = TLanes.Fma(e, TLanes.Create(-2.12194440e-4f), y);
        y = TLanes.Fma(z, TLanes.Create(-0.5f), y);
        return TLanes.Fma(e, TLanes.Create(0.693359375f), f + y);
    }

    /// <summary>Gumbel noise -log(-log(u)), u = (r >> 9) * 2^-23 + 2^-24, from the random bits r.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static TLanes Gumbel<TLanes>(TLanes random)
        where TLanes : unmanaged, ILanes<TLanes>
    {
        TLanes u = TLanes.Fma(
            TLanes.ToSingle(TLanes.ShiftRight(random, 9)), TLanes.Create(1f / (1 << 23)), TLanes.Create(1f / (1 << 24)));
        TLanes zero = TLanes.Create(0f);
        return zero - Log(zero - Log(u));
    }

    // Not inlined: a kernel that inlines too many of these exceeds the compiler's budget and is left with calls in its loops.
    [MethodImpl(MethodImplOptions.NoInlining | MethodImplOptions.AggressiveOptimization)]
    public static float Exp(float x) => Exp(new Lane(x)).V;

    [MethodImpl(MethodImplOptions.NoInlining | MethodImplOptions.AggressiveOptimization)]
    public static float Log(float x) => Log(new Lane(x)).V;

    [MethodImpl(MethodImplOptions.NoInlining | MethodImplOptions.AggressiveOptimization)]
    public static float Gumbel(uint random) => Gumbel(Lane.CreateBits(random)).V;

    /// <summary>Sine and cosine in double precision, |x| below 2^27: reduction by pi/2 in two constants, then fdlibm's kernels.</summary>
    public static (double Sin, double Cos) SinCos(double x)
    {
        const double TwoOverPi = 0.63661977236758134308;
        const double PiOver2High = 1.5707963267948966;
        const double PiOver2Low = 6.123233995736766e-17;

        // Math.Round to an even integer is an IEEE operation.
        double k = Math.Round(x * TwoOverPi);
        double r = Math.FusedMultiplyAdd(-k, PiOver2High, x);
        r = Math.FusedMultiplyAdd(-k, PiOver2Low, r);
        double z = r * r;

        double s = 1.58969099521155010221e-10;
        s = Math.FusedMultiplyAdd(s, z, -2.50507602534068634195e-08);
        s = Math.FusedMultiplyAdd(s, z, 2.75573137070700676789e-06);
        s = Math.FusedMultiplyAdd(s, z, -1.98412698298579493134e-04);
        s = Math.FusedMultiplyAdd(s, z, 8.33333333332248946124e-03);
        s = Math.FusedMultiplyAdd(s, z, -1.66666666666666324348e-01);
        double sin = Math.FusedMultiplyAdd(s * z, r, r);

        double c = -1.13596475577881948265e-11;
        c = Math.FusedMultiplyAdd(c, z, 2.08757232129817482790e-09);
        c = Math.FusedMultiplyAdd(c, z, -2.75573143513906633035e-07);
        c = Math.FusedMultiplyAdd(c, z, 2.48015872894767294178e-05);
        c = Math.FusedMultiplyAdd(c, z, -1.38888888888741095749e-03);
        c = Math.FusedMultiplyAdd(c, z, 4.16666666666666019037e-02);
        double cos = Math.FusedMultiplyAdd(c * z, z, Math.FusedMultiplyAdd(z, -0.5, 1.0));

        return ((long)k & 3) switch
        {
            0 => (sin, cos),
            1 => (cos, -sin),
            2 => (-sin, -cos),
            _ => (-cos, sin),
        };
    }
}
