namespace Rollout.Kernels.Tests;

public sealed class VectorMathTests
{
    [Theory]
    [InlineData(0u, 0u, 0u, 0u, 0u, 0u, 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u)]
    [InlineData(
        0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu, 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu)]
    [InlineData(
        0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u, 0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u)]
    public void Philox_gives_the_known_answers_of_Random123(
        uint c0, uint c1, uint c2, uint c3, uint k0, uint k1, uint r0, uint r1, uint r2, uint r3)
    {
        uint[] expected = [r0, r1, r2, r3];
        Assert.Equal(expected, Sampling.Philox([c0, c1, c2, c3], [k0, k1]));
        Assert.Equal(expected, Vector<Lane>());
        Assert.Equal(expected, Vector<Lanes128>());
        Assert.Equal(expected, Vector<Lanes256>());
        Assert.Equal(expected, Vector<Lanes512>());

        uint[] Vector<TLanes>()
            where TLanes : unmanaged, ILanes<TLanes>
        {
            TLanes x0 = TLanes.CreateBits(c0), x1 = TLanes.CreateBits(c1), x2 = TLanes.CreateBits(c2), x3 = TLanes.CreateBits(c3);
            Philox.Generate(ref x0, ref x1, ref x2, ref x3, k0, k1);
            return [Bits(x0), Bits(x1), Bits(x2), Bits(x3)];
        }

        // All lanes are equal, so the largest is any of them.
        static uint Bits<TLanes>(TLanes lanes)
            where TLanes : unmanaged, ILanes<TLanes> =>
            ((uint)TLanes.Largest(TLanes.ToSingle(TLanes.ShiftRight(lanes, 16))) << 16)
            | (uint)TLanes.Largest(TLanes.ToSingle(TLanes.ShiftRight(TLanes.ShiftLeft(lanes, 16), 16)));
    }

    [Fact]
    public void Exp_is_within_two_units_of_the_last_place()
    {
        for (float x = -87f; x < 88f; x += 0.000713f)
            Check(Math.Exp(x), VectorMath.Exp(x), 1.5, x);
        Assert.Equal(1f, VectorMath.Exp(0f));
        Assert.Equal(1f, VectorMath.Exp(-0f));
        Assert.Equal(0f, VectorMath.Exp(float.NegativeInfinity));
        Assert.Equal(0f, VectorMath.Exp(-1000f));
        Assert.Equal(float.PositiveInfinity, VectorMath.Exp(1000f));
        Assert.True(float.IsNaN(VectorMath.Exp(float.NaN)));
        Assert.Equal((float)Math.Exp(-100.0), VectorMath.Exp(-100f), 1e-44f);
    }

    [Fact]
    public void Every_width_gives_the_same_exponentials_and_logarithms()
    {
        for (uint bits = 0; bits < 0xFFFF0000; bits += 0x1234)
        {
            float x = BitConverter.UInt32BitsToSingle(bits);
            int expected = Canonical(VectorMath.Exp(x));
            Assert.Equal(expected, Canonical(Lanes128.Largest(VectorMath.Exp(Lanes128.Create(x)))));
            Assert.Equal(expected, Canonical(Lanes256.Largest(VectorMath.Exp(Lanes256.Create(x)))));
            Assert.Equal(expected, Canonical(Lanes512.Largest(VectorMath.Exp(Lanes512.Create(x)))));
            if (!float.IsNormal(x) || x < 0)
                continue;
            expected = Canonical(VectorMath.Log(x));
            Assert.Equal(expected, Canonical(Lanes128.Largest(VectorMath.Log(Lanes128.Create(x)))));
            Assert.Equal(expected, Canonical(Lanes512.Largest(VectorMath.Log(Lanes512.Create(x)))));
        }

        // All NaNs count as equal here.
        static int Canonical(float value) => float.IsNaN(value) ? -1 : BitConverter.SingleToInt32Bits(value);
    }

    [Fact]
    public void Log_is_within_two_units_of_the_last_place()
    {
        for (float x = 1e-37f; x < 1e38f; x *= 1.00037f)
            Check(Math.Log(x), VectorMath.Log(x), 1.5, x);
        for (float x = 0.5f; x < 2f; x += 1.3e-5f)
            Check(Math.Log(x), VectorMath.Log(x), 2, x);
        Assert.Equal(0f, VectorMath.Log(1f));
    }

    [Fact]
    public void Gumbel_noise_is_that_of_its_definition_at_both_ends()
    {
        foreach (uint r in new[] { 0u, 511u, 512u, 1u << 31, 0x12345678u, uint.MaxValue })
        {
            double u = ((r >> 9) * Math.Pow(2, -23)) + Math.Pow(2, -24);
            Assert.Equal(-Math.Log(-Math.Log(u)), VectorMath.Gumbel(r), 5e-6);
        }
    }

    [Fact]
    public void Sine_and_cosine_are_right_to_the_last_bits_of_fp32()
    {
        for (double x = 0; x < 1_100_000; x = (x * 1.0007) + 0.013)
        {
            (double sin, double cos) = VectorMath.SinCos(x);
            Assert.Equal(Math.Sin(x), sin, 1e-10 / 1e2);
            Assert.Equal(Math.Cos(x), cos, 1e-10 / 1e2);
        }

        Assert.Equal((0.0, 1.0), VectorMath.SinCos(0));
    }

    private static void Check(double expected, float actual, double units, float x)
    {
        float size = Math.Abs((float)expected);
        double unit = Math.Max(float.Epsilon, (double)size - MathF.BitDecrement(size));
        if (!(Math.Abs(expected - actual) <= units * unit))
            Assert.Fail($"At {x:R}: expected {expected:R}, found {actual:R}, {Math.Abs(expected - actual) / unit} units off.");
    }
}
