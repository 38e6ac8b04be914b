namespace Rollout.Examples.Grpo;
public static class PlotFont { public static void Install() { } }
